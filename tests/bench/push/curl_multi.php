<?php
// A web push sender on curl_multi: one process, HTTP/2, a window of requests in flight, answers read as they come.
declare(strict_types=1);

// As many streams as curl puts on one connection.
const WINDOW = 100;

// What stands before the 65 bytes of a P-256 public key in DER (RFC 5480).
const SPKI = "\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00";

function base64url(string $bytes): string
{
    return rtrim(strtr(base64_encode($bytes), '+/', '-_'), '=');
}

function unbase64url(string $text): string
{
    return base64_decode(strtr($text, '-_', '+/'), true);
}

function new_key(): OpenSSLAsymmetricKey
{
    return openssl_pkey_new([
        'private_key_type' => OPENSSL_KEYTYPE_EC,
        'curve_name' => 'prime256v1',
        // Else openssl.cnf is read for each key, which is a third of the time. The length is read from there too: one
        // must be given, though the curve has its own.
        'config' => '/dev/null',
        'private_key_bits' => 2048,
    ]);
}

/** The public key as an uncompressed point. OpenSSL leaves leading zeros out. */
function point(OpenSSLAsymmetricKey $key): string
{
    $ec = openssl_pkey_get_details($key)['ec'];
    return "\x04" . str_pad($ec['x'], 32, "\0", STR_PAD_LEFT) . str_pad($ec['y'], 32, "\0", STR_PAD_LEFT);
}

/** RFC 8291. It decodes the receiver's keys each time, since receivers differ. */
function encrypt(string $text, string $p256dh, string $auth): string
{
    $receiver = unbase64url($p256dh);
    $pem = "-----BEGIN PUBLIC KEY-----\n" . base64_encode(SPKI . $receiver) . "\n-----END PUBLIC KEY-----\n";
    $key = new_key();
    $sender = point($key);
    $shared = openssl_pkey_derive(openssl_pkey_get_public($pem), $key);
    $ikm = hash_hkdf('sha256', $shared, 32, "WebPush: info\0" . $receiver . $sender, unbase64url($auth));
    $salt = random_bytes(16);
    $cek = hash_hkdf('sha256', $ikm, 16, "Content-Encoding: aes128gcm\0", $salt);
    $nonce = hash_hkdf('sha256', $ikm, 12, "Content-Encoding: nonce\0", $salt);
    $sealed = openssl_encrypt($text . "\x02", 'aes-128-gcm', $cek, OPENSSL_RAW_DATA, $nonce, $tag);
    return $salt . pack('NC', 4096, 65) . $sender . $sealed . $tag;
}

/** An integer of a DER signature at $at, as 32 bytes; moves $at behind it. */
function integer(string $der, int &$at): string
{
    $length = ord($der[$at + 1]);
    $value = substr($der, $at + 2, $length);
    $at += 2 + $length;
    return str_pad(ltrim($value, "\0"), 32, "\0", STR_PAD_LEFT);
}

/** RFC 8292: the value of Authorization for an origin. */
function vapid(string $origin): string
{
    $key = new_key();
    $claims = ['aud' => $origin, 'exp' => time() + 12 * 3600, 'sub' => 'mailto:bench@example.org'];
    $token = base64url('{"typ":"JWT","alg":"ES256"}') . '.'
        . base64url(json_encode($claims, JSON_UNESCAPED_SLASHES));
    openssl_sign($token, $der, $key, OPENSSL_ALGO_SHA256);
    $at = 2;
    $signature = integer($der, $at) . integer($der, $at);
    return "vapid t=$token." . base64url($signature) . ', k=' . base64url(point($key));
}

function cpu_seconds(): float
{
    $usage = getrusage();
    return $usage['ru_utime.tv_sec'] + $usage['ru_stime.tv_sec']
        + ($usage['ru_utime.tv_usec'] + $usage['ru_stime.tv_usec']) / 1e6;
}

$options = getopt('', ['url:', 'ca:', 'count:', 'p256dh:', 'auth:']);
if (count($options) !== 5) {
    fwrite(STDERR, "usage: curl_multi.php --url URL --ca FILE --count N --p256dh KEY --auth SECRET\n");
    exit(2);
}
$count = (int) $options['count'];
$text = str_repeat('x', 200);

$began = hrtime(true);
$used = cpu_seconds();
['host' => $host, 'port' => $port] = parse_url($options['url']);
$headers = [
    'Authorization: ' . vapid("https://$host:$port"),
    'Content-Encoding: aes128gcm',
    'Content-Type: application/octet-stream',
    'TTL: 60',
];

$multi = curl_multi_init();
curl_multi_setopt($multi, CURLMOPT_PIPELINING, CURLPIPE_MULTIPLEX);
$started = 0;
$start = function (CurlHandle $handle) use (&$started, $multi, $options, $text): void {
    curl_setopt($handle, CURLOPT_URL, $options['url'] . str_pad((string) $started++, 180, '0', STR_PAD_LEFT));
    curl_setopt($handle, CURLOPT_POSTFIELDS, encrypt($text, $options['p256dh'], $options['auth']));
    curl_multi_add_handle($multi, $handle);
};
while ($started < min($count, WINDOW)) {
    $handle = curl_init();
    curl_setopt_array($handle, [
        CURLOPT_HTTP_VERSION => CURL_HTTP_VERSION_2TLS,
        CURLOPT_CAINFO => $options['ca'],
        CURLOPT_HTTPHEADER => $headers,
        CURLOPT_RETURNTRANSFER => true,
        CURLOPT_TIMEOUT => 10,
        // Wait for the first connection to be multiplexed on, rather than open one for each.
        CURLOPT_PIPEWAIT => true,
    ]);
    $start($handle);
}

$sent = $failed = 0;
$running = min($count, WINDOW);
while ($running > 0) {
    $status = curl_multi_exec($multi, $unfinished);
    if ($status !== CURLM_OK) {
        throw new RuntimeException(curl_multi_strerror($status));
    }
    $idle = true;
    while ($info = curl_multi_info_read($multi)) {
        $idle = false;
        $handle = $info['handle'];
        // Whatever curl calls it: to 7.88 it is an error when the answer comes before all of the body is sent.
        $code = curl_getinfo($handle, CURLINFO_RESPONSE_CODE);
        if ($code === 201) {
            $sent++;
        } elseif ($failed++ === 0) {
            fwrite(STDERR, "first failure: $code " . curl_strerror($info['result']) . "\n");
        }
        curl_multi_remove_handle($multi, $handle);
        if ($started < $count) {
            $start($handle);
        } else {
            $running--;
        }
    }
    if ($idle) {
        curl_multi_select($multi);
    }
}

echo json_encode([
    'sent' => $sent,
    'seconds' => (hrtime(true) - $began) / 1e9,
    'cpu_seconds' => cpu_seconds() - $used,
]), "\n";
