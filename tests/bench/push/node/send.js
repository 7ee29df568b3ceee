// A web push sender on npm's web-push, as its users write it: it knows HTTP/1.1 only, so connections are kept alive.
'use strict';

const fs = require('fs');
const https = require('https');
const { parseArgs } = require('util');
const webpush = require('web-push');

const CONCURRENCY = 64;

const string = { type: 'string' };
const { values: options } = parseArgs({
  options: { url: string, ca: string, count: string, p256dh: string, auth: string },
});
const count = Number(options.count);
const keys = { p256dh: options.p256dh, auth: options.auth };
const text = 'x'.repeat(200);

async function main() {
  const began = process.hrtime.bigint();
  const used = process.cpuUsage();
  const agent = new https.Agent({ keepAlive: true, maxSockets: CONCURRENCY, ca: fs.readFileSync(options.ca) });
  const { publicKey, privateKey } = webpush.generateVAPIDKeys();
  webpush.setVapidDetails('mailto:bench@example.org', publicKey, privateKey);

  let started = 0;
  let sent = 0;
  let failed = 0;
  const worker = async () => {
    while (started < count) {
      const endpoint = options.url + String(started++).padStart(180, '0');
      try {
        const answer = await webpush.sendNotification({ endpoint, keys }, text, { TTL: 60, agent });
        sent += answer.statusCode === 201 ? 1 : 0;
      } catch (error) {
        if (failed++ === 0) console.error(`first failure: ${error.statusCode ?? ''} ${error.message}`);
      }
    }
  };
  await Promise.all(Array.from({ length: CONCURRENCY }, worker));

  const { user, system } = process.cpuUsage(used);
  const seconds = Number(process.hrtime.bigint() - began) / 1e9;
  console.log(JSON.stringify({ sent, seconds, cpu_seconds: (user + system) / 1e6 }));
  agent.destroy();
}

main();
