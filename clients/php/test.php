<?php

// Walks through the client against a running server. ../python/test_client.py says which environment this needs.

declare(strict_types=1);

use Perennial\Client;
use Perennial\Problem;

require __DIR__ . '/Perennial.php';

// Exceptions have the arguments of their calls, as on a development machine.
ini_set('zend.exception_ignore_args', '0');
set_error_handler(static fn (int $level, string $text) => throw new ErrorException($text, 0, $level));

[$url, $key, $endpoint] = array_map('getenv', ['PERENNIAL_URL', 'PERENNIAL_KEY', 'PERENNIAL_ENDPOINT']);

/**
 * A proxy that does one thing with each request: `pass` it, `drop` its answer, or refuse it as `busy N` seconds. It is
 * a process of its own that writes its URL, and then the id in each answer of the server.
 */
function run_proxy(string $url, array $actions): void
{
    $listener = stream_socket_server('tcp://127.0.0.1:0');
    echo 'http://', stream_socket_get_name($listener, false), "\n";
    foreach ($actions as $action) {
        $client = stream_socket_accept($listener, 60);
        for ($request = ''; !str_contains($request, "\r\n\r\n");) {
            $request .= fread($client, 65536);
        }
        [$head, $body] = explode("\r\n\r\n", $request, 2);
        preg_match('/content-length: (\d+)/i', $head, $length);
        while (strlen($body) < (int) $length[1]) {
            $body .= fread($client, 65536);
        }
        if (str_starts_with($action, 'busy ')) {
            echo "busy\n";
            $seconds = substr($action, 5);
            fwrite($client, "HTTP/1.1 503 Busy\r\nRetry-After: $seconds\r\nContent-Length: 0\r\n\r\n");
        } else {
            $server = stream_socket_client('tcp://' . explode('://', $url)[1]);
            fwrite($server, "$head\r\nConnection: close\r\n\r\n$body");
            $answer = stream_get_contents($server);
            echo json_decode(explode("\r\n\r\n", $answer, 2)[1], true)['id'] ?? 'none', "\n";
            fwrite($client, $action === 'pass' ? $answer : '');
        }
        fclose($client);
    }
}

if (($argv[1] ?? '') === 'proxy') {
    run_proxy($argv[2], array_slice($argv, 3));
    exit;
}

/** Starts the proxy. Returns its URL, and a function that ends it and returns what it has seen. */
function proxy(string ...$actions): array
{
    $command = [PHP_BINARY, __FILE__, 'proxy', getenv('PERENNIAL_URL'), ...$actions];
    $process = proc_open($command, [['file', '/dev/null', 'r'], ['pipe', 'w']], $pipes);
    $seen = static function () use ($process, $pipes): array {
        proc_terminate($process);
        return explode("\n", trim(stream_get_contents($pipes[1])));
    };
    return [trim(fgets($pipes[1])), $seen];
}

/** A valid subscription that the push service does not know. The keys are those of RFC 8291, section 5. */
function subscription(): array
{
    $p256dh = 'BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4';
    $keys = ['p256dh' => $p256dh, 'auth' => 'BTBZMqHH6r4Tts7J_aSIgg'];
    return ['endpoint' => getenv('PERENNIAL_ENDPOINT') . bin2hex(random_bytes(16)), 'keys' => $keys];
}

function same(mixed $wanted, mixed $found): void
{
    if ($wanted !== $found) {
        throw new LogicException('wanted ' . var_export($wanted, true) . ', found ' . var_export($found, true));
    }
}

function problem(callable $call): Problem
{
    try {
        $call();
    } catch (Problem $problem) {
        return $problem;
    }
    throw new LogicException('there is no problem');
}

$client = new Client($url, $key);
$random = static fn (): string => bin2hex(random_bytes(16));

$tests = [
    'subscriptions' => static function () use ($client, $random): void {
        [$user, $tag, $mine] = ["ann/ü {$random()}", "t{$random()}", subscription()];
        $id = $client->subscribe($mine, $client->pushKey(), $user, [$tag], ['name' => 'Ann']);
        same($id, $client->subscribe($mine));
        $stored = $client->subscription($id);
        same([$user, [$tag], ['name' => 'Ann']], [$stored['user'], $stored['tags'], $stored['metadata']]);
        foreach ([['user' => $user], ['tag' => $tag], ['endpoint' => $mine['endpoint']]] as $filter) {
            same([$id], array_column($client->subscriptions(...$filter)['subscriptions'], 'id'));
        }
        same($id, $client->user($user)['subscriptions'][0]['id']);
        same($id, $client->logout($mine));
        same(false, isset($client->subscription($id)['user']));
        same([true, false], [$client->unsubscribe($mine['endpoint']), $client->unsubscribe($mine['endpoint'])]);
        same(false, $client->unsubscribe($id));
        $client->subscribe(subscription(), user: $user, metadata: []);
        same(1, $client->deleteUser($user)['subscriptions']);
    },
    'a notification ends' => static function () use ($client, $random): void {
        $tag = "t{$random()}";
        $id = $client->subscribe(subscription(), tags: [$tag]);
        same(1, $client->notify('x', tags: $tag, dryRun: true)['audience']);
        $options = ['icon' => '/i.png'];
        $accepted = $client->notify('Hello', 'World', '/news', $options, tags: $tag, log: 'all', ttl: 60);
        $ended = $client->wait($accepted['id']);
        same(['done', ['gone' => 1]], [$ended['state'], $ended['outcomes']]);
        same([$id], array_column($client->deliveries($accepted['id']), 'subscription'));
        same([], $client->deliveries($accepted['id'], 'delivered'));
        same(404, problem(static fn () => $client->subscription($id))->status);
    },
    'a notification is delivered' => static function () use ($client): void {
        if (($subscription = getenv('PERENNIAL_SUBSCRIPTION')) !== false) {
            $accepted = $client->notify('Hello', push: [json_decode($subscription, true)]);
            same(['delivered' => 1], $client->wait($accepted['id'])['outcomes']);
        }
    },
    'a scheduled notification is changed' => static function () use ($client): void {
        $at = new DateTimeImmutable('+1 day', new DateTimeZone('Asia/Kolkata'));
        $expires = $at->modify('+1 hour');
        $id = $client->notify('Later', user: 'nobody', at: $at, expires: $expires, rate: 10, rampUp: '1s')['id'];
        $stored = new DateTimeImmutable($client->notification($id)['at']);
        same($at->format('U.v'), $stored->format('U.v'));
        same('paused', $client->pause($id)['state']);
        same('scheduled', $client->resume($id)['state']);
        same(5.0, (float) $client->setRate($id, 5)['rate_wanted']);
        same(false, isset($client->setRate($id, null)['rate_wanted']));
        same('scheduled', $client->wait($id, 0.2)['state']);
        same('cancelled', $client->cancel($id)['state']);
        $next = $client->notifications(limit: 1)['next'];
        same(true, $client->notifications($next, 1)['notifications'][0]['id'] < $next);
    },
    'a user token names a user' => static function () use ($client, $url, $random): void {
        if (($secret = getenv('PERENNIAL_USER_SECRET')) !== false) {
            $user = "bob {$random()}";
            $token = Client::userToken($user, "$secret\n");
            $body = json_encode(['subscription' => subscription(), 'user' => $user, 'user_token' => $token]);
            $page = ['method' => 'POST', 'header' => 'content-type: application/json', 'content' => $body];
            file_get_contents("$url/subscriptions", false, stream_context_create(['http' => $page]));
            same(1, $client->deleteUser($user)['subscriptions']);
        }
    },
    'problems name the field' => static function () use ($client, $url): void {
        $problem = problem(static fn () => $client->notify('', tags: 'a and'));
        same([422, 'about:blank', 5], [$problem->status, $problem->type, $problem->errors[0]['position']]);
        same(['to.tags', 'notification.title'], $problem->fields());
        same(true, str_contains($problem->getMessage(), 'to.tags: wanted ') && $problem->requestId !== null);
        same(['to'], problem(static fn () => $client->notify('x'))->fields());
        same(['to'], problem(static fn () => $client->notify('x', all: true, tags: 'a'))->fields());
        $injected = problem(static fn () => $client->notify('x', all: true, idempotencyKey: "a\nb: c"));
        same(['Idempotency-Key'], $injected->fields());
        $broken = ['keys' => ['p256dh' => 'x', 'auth' => 'x']] + subscription();
        $field = problem(static fn () => $client->subscribe($broken))->fields()[0];
        same(true, str_starts_with($field, 'subscription.keys.'));
        same(404, problem(static fn () => $client->notification('no such'))->status);
        same(404, problem(static fn () => $client->enqueue('no.such', [], unique: 'a'))->status);
        same(401, problem(static fn () => (new Client($url, 'pk_wrong'))->pushKey())->status);
    },
    'no answer' => static function () use ($key): void {
        $silent = stream_socket_server('tcp://127.0.0.1:0');
        $url = 'http://' . stream_socket_get_name($silent, false);
        $began = microtime(true);
        $problem = problem(static fn () => (new Client($url, $key, timeout: 0.5, attempts: 1))->pushKey());
        same([0, true], [$problem->status, microtime(true) - $began < 2]);
        same(true, str_starts_with($problem->detail, "$url: Operation timed out"));
        fclose($silent);
        $began = microtime(true);
        $problem = problem(static fn () => (new Client($url, $key, patience: 2))->pushKey());
        same([0, true], [$problem->status, microtime(true) - $began < 3]);
        same(true, str_starts_with($problem->detail, "$url: Failed to connect"));
    },
    'a repeated notification is one' => static function () use ($key, $random): void {
        [$url, $seen] = proxy('drop', 'busy 1', 'pass');
        $began = microtime(true);
        $id = (new Client($url, $key))->notify('x', user: 'nobody', idempotencyKey: $random())['id'];
        same(true, microtime(true) - $began > 1);
        same([$id, 'busy', $id], $seen());
    },
    'what is not repeated' => static function () use ($key): void {
        [$url, $seen] = proxy('drop', 'pass');
        same(0, problem(static fn () => (new Client($url, $key))->notify('x', user: 'nobody'))->status);
        same(1, count($seen()));
        [$url, $seen] = proxy('busy 60', 'pass');
        $problem = problem(static fn () => (new Client($url, $key))->logout(subscription()));
        same([503, 60, ['busy']], [$problem->status, $problem->retryAfter, $seen()]);
    },
    'the key is not shown' => static function () use ($client, $key, $url): void {
        ob_start();
        var_dump($client, (array) $client);
        var_export($client);
        print_r($client);
        $shown = ob_get_clean();
        [$dropping] = proxy('drop');
        foreach ([$url, 'http://127.0.0.1:2', $dropping] as $at) {
            $other = new Client($at, $key, attempts: 1);
            $problem = problem(static fn () => $other->notify(tags: 'a'));
            $shown .= $problem . print_r(array_slice($problem->getTrace(), 0, 3), true);
        }
        try {
            new Client($url, "$key\n$key");
        } catch (InvalidArgumentException $error) {
            $shown .= $error . print_r(PHP_VERSION_ID < 80200 ? '' : $error->getTrace()[0], true);
        }
        same(false, str_contains($shown, $key));
        try {
            serialize($client);
            throw new LogicException('it is serialized');
        } catch (Exception $refused) {
            same(true, str_contains($refused->getMessage(), 'is not allowed'));
        }
    },
];

$failed = 0;
foreach ($tests as $name => $test) {
    try {
        $test();
        echo "ok: $name\n";
    } catch (Throwable $error) {
        echo "failed: $name: $error\n";
        $failed++;
    }
}
exit($failed === 0 ? 0 : 1);
