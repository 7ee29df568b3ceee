<?php

declare(strict_types=1);

namespace Perennial;

/**
 * A client of Perennial's HTTP interface, for a backend: PHP 8.1 and ext-curl. Streams would do without an extension,
 * but they bound only each read; curl bounds a whole request. ../README.md says what is repeated, and when.
 */
final class Client
{
    /** The API keys are not in the objects, so that no dump, cast or serialization of a client shows its key. */
    private static ?\WeakMap $keys = null;
    private readonly string $url;
    private readonly \CurlHandle $curl;

    /**
     * @param string $url URL of the server, such as https://push.example.com
     * @param float $timeout longest time of one request, in seconds
     * @param int $attempts largest number of requests of one call
     * @param float $patience longest time of one call, with all its requests and the pauses between them, in seconds
     */
    public function __construct(string $url, #[\SensitiveParameter] string $key, private readonly float $timeout = 10,
        private readonly int $attempts = 4, private readonly float $patience = 30)
    {
        if (preg_match('/^[!-~]+$/D', $key = trim($key)) !== 1) {
            throw new \InvalidArgumentException('an API key has printable characters only');
        }
        self::$keys ??= new \WeakMap();
        self::$keys[$this] = $key;
        $this->url = rtrim($url, '/');
        $this->curl = curl_init();
    }

    private function __clone() {}

    /**
     * Sends a notification to one audience: `all`, `user`, `users`, `tags`, `subscriptions` or `push`. With an
     * idempotency key, the same call within 24 hours sends nothing more and returns the same id.
     *
     * @param array $options further options of showNotification: icon, actions
     * @param mixed $payload instead of a title: any value, for a service worker of your own
     * @param ?string $tags an expression: news and fr and not muted
     * @param ?list<int> $subscriptions ids of subscriptions
     * @param ?list<array> $push subscriptions that are not stored
     * @param ?bool $template false sends {{name}} as it is, as texts of visitors need it
     * @return array{id: string, state: string, audience: int, warnings?: list<string>}
     */
    public function notify(?string $title = null, ?string $body = null, ?string $url = null, array $options = [],
        mixed $payload = null, bool $all = false, ?string $user = null, ?array $users = null, ?string $tags = null,
        ?array $subscriptions = null, ?array $push = null, ?string $idempotencyKey = null, ?int $ttl = null,
        ?string $urgency = null, ?string $topic = null, ?float $rate = null, ?string $rampUp = null,
        \DateTimeInterface|string|null $at = null, \DateTimeInterface|string|null $expires = null,
        ?string $webhook = null, ?string $log = null, ?bool $declarative = null, ?string $http = null,
        ?bool $template = null, ?bool $dryRun = null): array
    {
        if ($idempotencyKey !== null && preg_match('/^[ -~]{1,255}$/D', $idempotencyKey) !== 1) {
            $error = ['field' => 'Idempotency-Key', 'wanted' => '1 to 255 printable characters'];
            throw new Problem(422, 'Unprocessable Entity', 'not as wanted: Idempotency-Key', [$error]);
        }
        $time = static fn ($time) => $time instanceof \DateTimeInterface ? $time->format('Y-m-d\TH:i:s.vP') : $time;
        $to = ['all' => $all ?: null] + compact('user', 'users', 'tags', 'subscriptions', 'push');
        $request = ['to' => (object) self::given($to), 'ramp_up' => $rampUp, 'dry_run' => $dryRun,
            'notification' => self::given(compact('title', 'body', 'url')) + $options ?: null,
            'at' => $time($at), 'expires' => $time($expires)] + compact('payload', 'ttl', 'urgency', 'topic', 'rate');
        $request += compact('webhook', 'log', 'declarative', 'http', 'template');
        return $this->call('POST', '/notify', self::given($request), $idempotencyKey !== null, $idempotencyKey);
    }

    /** The state of a notification, and its outcomes so far. */
    public function notification(string $id): array { return $this->call('GET', self::path('notifications', $id)); }

    /** Notifications, the newest first: `notifications`, and `next`, the cursor of the next page. */
    public function notifications(?string $cursor = null, ?int $limit = null): array
    {
        return $this->call('GET', '/notifications' . self::query(compact('cursor', 'limit')));
    }

    /** Waits until a notification has ended, or until so many seconds are over, and returns its state. */
    public function wait(string $id, float $seconds = 60): array
    {
        $end = self::now() + $seconds;
        for ($pause = 0.1;; $pause = min(2, $pause * 1.5)) {
            $found = $this->notification($id);
            $left = $end - self::now();
            if ($left <= 0 || in_array($found['state'], ['done', 'cancelled', 'expired'], true)) {
                return $found;
            }
            usleep((int) (min($pause, $left) * 1e6));
        }
    }

    public function pause(string $id): array
    {
        return $this->call('POST', self::path('notifications', $id, 'pause'), repeatable: true);
    }

    public function resume(string $id): array
    {
        return $this->call('POST', self::path('notifications', $id, 'resume'), repeatable: true);
    }

    public function cancel(string $id): array
    {
        return $this->call('POST', self::path('notifications', $id, 'cancel'), repeatable: true);
    }

    /** Changes the sends per second; null is as fast as push services take them. */
    public function setRate(string $id, ?float $rate): array
    {
        return $this->call('PATCH', self::path('notifications', $id), ['rate' => $rate], true);
    }

    /** The logged deliveries of a notification: failures, or all if it was sent with `log: 'all'`. */
    public function deliveries(string $id, ?string $outcome = null): array
    {
        $path = self::path('notifications', $id, 'deliveries');
        return $this->call('GET', $path . self::query(compact('outcome')));
    }

    /** The applicationServerKey that pages subscribe with. */
    public function pushKey(): string { return $this->call('GET', '/push/key')['key']; }

    /**
     * Stores a subscription in the form of a browser's `PushSubscription.toJSON()`, and returns its id. What is not
     * given stays as it is stored.
     *
     * @param ?string $key the applicationServerKey that the subscription was made with
     * @param ?array{endpoint: string, auth: string} $replaces the subscription that the browser had before
     */
    public function subscribe(array $subscription, ?string $key = null, ?string $user = null, ?array $tags = null,
        ?array $metadata = null, ?array $replaces = null): int
    {
        $request = compact('subscription', 'key', 'user', 'tags', 'replaces');
        $request['metadata'] = $metadata === null ? null : (object) $metadata;
        return $this->call('POST', '/subscriptions', self::given($request), true)['id'];
    }

    /** Takes its user, and the tags and metadata of that user, off a subscription, which stays. */
    public function logout(array $subscription): int
    {
        return $this->call('POST', '/subscriptions', ['subscription' => $subscription, 'user' => null], true)['id'];
    }

    /** Deletes a subscription by its id or its endpoint; false when there is none. */
    public function unsubscribe(int|string $which): bool
    {
        try {
            $path = is_int($which) ? "/subscriptions/$which" : '/subscriptions';
            $this->call('DELETE', $path, is_int($which) ? null : ['endpoint' => $which], true);
            return true;
        } catch (Problem $problem) {
            return $problem->status === 404 ? false : throw $problem;
        }
    }

    public function subscription(int $id): array { return $this->call('GET', "/subscriptions/$id"); }

    /** Subscriptions in the order of their ids: `subscriptions`, and `next`, the cursor of the next page. */
    public function subscriptions(?string $user = null, ?string $tag = null, ?string $endpoint = null,
        ?int $cursor = null, ?int $limit = null): array
    {
        $query = self::query(compact('user', 'tag', 'endpoint', 'cursor', 'limit'));
        return $this->call('GET', '/subscriptions' . $query);
    }

    /** Everything that is stored about a user. */
    public function user(string $user): array { return $this->call('GET', self::path('users', $user)); }

    /** Deletes everything that is stored about a user, and returns the numbers of subscriptions and deliveries. */
    public function deleteUser(string $user): array
    {
        return $this->call('DELETE', self::path('users', $user), null, true);
    }

    /** Makes the token with which a page may name this user. The secret is that of `sites.SITE.user_secret_file`. */
    public static function userToken(string $user, #[\SensitiveParameter] string $secret, string $site = 'default',
        int $seconds = 3600): string
    {
        $expires = time() + $seconds;
        $signature = hash_hmac('sha256', "v1.$site.$expires.$user", rtrim($secret, "\r\n"), true);
        return "v1.$expires." . rtrim(strtr(base64_encode($signature), '+/', '-_'), '=');
    }

    /**
     * Enqueues a job of a public kind, and returns its id: the id of another job, while one of this kind with this
     * unique key has not ended.
     */
    public function enqueue(string $kind, mixed $payload, ?string $delay = null, ?string $unique = null,
        ?int $priority = null): string
    {
        // PHP has one value for an empty list and an empty object, and payloads are objects.
        $request = ['payload' => $payload === [] ? new \stdClass() : $payload];
        $request += self::given(compact('delay', 'unique', 'priority'));
        return $this->call('POST', self::path('jobs', $kind), $request)['id'];
    }

    /** Sends a request, and repeats it within the attempts and the patience if that is safe and may help. */
    private function call(string $method, string $path, ?array $body = null, bool $repeatable = false,
        ?string $idempotencyKey = null): array
    {
        $repeatable = $repeatable || $method === 'GET';
        $end = self::now() + $this->patience;
        for ($attempt = 1;; $attempt++) {
            try {
                return $this->send($method, $path, $body, $repeatable, $idempotencyKey, $end - self::now());
            } catch (Problem $problem) {
                $pause = ($problem->retryAfter ?? 0) + min(8, 2 ** ($attempt - 3)) * random_int(500, 1000) / 1000;
                $mayHelp = $repeatable && $problem->isTransient() && $attempt < $this->attempts;
                if (!$mayHelp || self::now() + $pause >= $end) {
                    throw $problem;
                }
                usleep((int) ($pause * 1e6));
            }
        }
    }

    private function send(string $method, string $path, ?array $body, bool $repeatable, ?string $idempotencyKey,
        float $left): array
    {
        $headers = ['Authorization: Bearer ' . self::$keys[$this], 'Content-Type: application/json'];
        $headers = [...$headers, ...($idempotencyKey === null ? [] : ["Idempotency-Key: $idempotencyKey"])];
        $answered = [];
        curl_reset($this->curl);
        curl_setopt_array($this->curl, [
            CURLOPT_URL => $this->url . $path,
            CURLOPT_CUSTOMREQUEST => $method,
            CURLOPT_HTTPHEADER => $headers,
            CURLOPT_RETURNTRANSFER => true,
            CURLOPT_TIMEOUT_MS => (int) max(1, 1000 * min($this->timeout, $left)),
            CURLOPT_NOSIGNAL => true,
            // Neither a redirect nor a proxy of the environment gets the key.
            CURLOPT_FOLLOWLOCATION => false,
            CURLOPT_NOPROXY => '*',
            CURLOPT_PROTOCOLS => CURLPROTO_HTTP | CURLPROTO_HTTPS,
            // Curl itself repeats a request whose kept connection turns out to be closed.
            CURLOPT_FRESH_CONNECT => !$repeatable,
            CURLOPT_HEADERFUNCTION => static function (\CurlHandle $_, string $line) use (&$answered): int {
                [$name, $value] = explode(':', $line, 2) + [1 => ''];
                $answered[strtolower($name)] = trim($value);
                return strlen($line);
            },
        ]);
        if ($body !== null) {
            curl_setopt($this->curl, CURLOPT_POSTFIELDS, json_encode($body, JSON_THROW_ON_ERROR));
        }
        $text = curl_exec($this->curl);
        if ($text === false) {
            throw new Problem(0, 'No Answer', "$this->url: " . curl_error($this->curl));
        }
        $status = curl_getinfo($this->curl, CURLINFO_RESPONSE_CODE);
        $type = $answered['content-type'] ?? '';
        $text = str_starts_with($type, 'application/x-ndjson') ? '[' . strtr(trim($text), "\n", ',') . ']' : $text;
        $answer = $text === '' && $status < 300 ? [] : json_decode($text, true);
        if ($status < 300 && is_array($answer)) {
            return $answer;
        }
        $after = $answered['retry-after'] ?? '';
        $after = $after === '' || ctype_digit($after) ? $after : max(0, (int) strtotime($after) - time());
        $answer = str_starts_with($type, 'application/problem+json') && is_array($answer) ? $answer : [];
        // A problem without a type is about:blank (RFC 9457, section 4.2.1), and a proxy answers in its own way.
        $answer += ['title' => 'Unexpected Answer', 'detail' => '', 'errors' => [], 'type' => 'about:blank'];
        throw new Problem($status, $answer['title'], $answer['detail'], $answer['errors'],
            $after === '' ? null : (int) $after, $answer['type'], $answered['x-request-id'] ?? null);
    }

    private static function now(): float { return hrtime(true) / 1e9; }

    private static function path(string ...$parts): string
    {
        return '/' . implode('/', array_map('rawurlencode', $parts));
    }

    private static function given(array $values): array
    {
        return array_filter($values, static fn (mixed $value): bool => $value !== null);
    }

    private static function query(array $values): string
    {
        return '?' . http_build_query(self::given($values), '', '&', PHP_QUERY_RFC3986);
    }
}

/** A failed call: the problem document of the server (RFC 9457); the status is 0 when no answer came. */
final class Problem extends \RuntimeException
{
    /**
     * @param list<array{field: string, wanted: string, position?: int}> $errors the fields that are not as wanted
     * @param ?int $retryAfter how long the server wants to be left alone, in seconds
     * @param ?string $requestId id of the request in the log of the server
     */
    public function __construct(public readonly int $status, public readonly string $title,
        public readonly string $detail = '', public readonly array $errors = [],
        public readonly ?int $retryAfter = null, public readonly string $type = 'about:blank',
        public readonly ?string $requestId = null)
    {
        $wanted = array_map(static fn (array $it): string => "; {$it['field']}: wanted {$it['wanted']}", $errors);
        parent::__construct(rtrim("$status $title: $detail", ': ') . implode('', $wanted), $status);
    }

    /** The names of the fields that are not as wanted. */
    public function fields(): array { return array_column($this->errors, 'field'); }

    /** Returns true when a repetition may help. A 409 with Retry-After is a notification that is being accepted now. */
    public function isTransient(): bool
    {
        return in_array($this->status, [0, 429, 502, 503, 504], true)
            || ($this->status === 409 && $this->retryAfter !== null);
    }
}
