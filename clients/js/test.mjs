// Walks through the client against a running server. ../python/test_client.py says which environment this needs.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import net from "node:net";
import test from "node:test";
import { inspect } from "node:util";

import { Client, Problem } from "./perennial.mjs";

const { PERENNIAL_URL: URL_, PERENNIAL_KEY: KEY, PERENNIAL_ENDPOINT: ENDPOINT } = process.env;
const { PERENNIAL_SUBSCRIPTION: DELIVERABLE, PERENNIAL_USER_SECRET: SECRET } = process.env;
const client = new Client(URL_, KEY);

/** A valid subscription that the push service does not know. The keys are those of RFC 8291, section 5. */
function subscription() {
  const p256dh = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4";
  return { endpoint: `${ENDPOINT}${randomUUID()}`, keys: { p256dh, auth: "BTBZMqHH6r4Tts7J_aSIgg" } };
}

/** Listens on a free port and returns the URL. */
async function listen(server) {
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  server.unref();
  return `http://127.0.0.1:${server.address().port}`;
}

/** A proxy that does one thing with each request: `pass` it, `drop` its answer, or refuse it as `busy N` seconds. */
async function proxy(...actions) {
  const seen = { ids: [], requests: 0 };
  const { hostname, port } = new URL(URL_);
  const server = net.createServer((socket) => {
    let request = "";
    socket.on("error", () => {});
    socket.setEncoding("latin1").on("data", (part) => {
      request += part;
      const [head, body] = request.split("\r\n\r\n");
      if (body === undefined || body.length < Number(/content-length: (\d+)/i.exec(head)[1])) return;
      const [action, seconds] = actions[seen.requests].split(" ");
      seen.requests += 1;
      if (action === "busy") {
        socket.end(`HTTP/1.1 503 Busy\r\nRetry-After: ${seconds}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n`);
        return;
      }
      let answer = "";
      const upstream = net.connect(Number(port), hostname).setEncoding("latin1");
      upstream.write(`${head.replace(/connection: [^\r]*/i, "Connection: close")}\r\n\r\n${body}`, "latin1");
      upstream.on("data", (more) => { answer += more; }).on("end", () => {
        seen.ids.push(JSON.parse(answer.split("\r\n\r\n")[1]).id);
        if (action === "pass") socket.end(answer, "latin1");
        else socket.destroy();
      });
    });
  });
  return Object.assign(seen, { url: await listen(server) });
}

/** The problem with which a promise fails. */
const problem = (promise) => promise.then(() => assert.fail("there is no problem"), (error) => {
  assert.ok(error instanceof Problem, error);
  return error;
});

test("subscriptions", async () => {
  const [user, tag, mine] = [`ann/ü ${randomUUID()}`, `t${randomUUID()}`, subscription()];
  const key = await client.pushKey();
  const id = await client.subscribe(mine, { key, user, tags: [tag], metadata: { name: "Ann" } });
  assert.equal(await client.subscribe(mine), id);
  const stored = await client.subscription(id);
  assert.deepEqual([stored.user, stored.tags, stored.metadata], [user, [tag], { name: "Ann" }]);
  for (const filter of [{ user }, { tag }, { endpoint: mine.endpoint }]) {
    const found = await client.subscriptions(filter);
    assert.deepEqual(found.subscriptions.map((one) => one.id), [id]);
  }
  assert.equal((await client.user(user)).subscriptions[0].id, id);
  assert.equal(await client.logout(mine), id);
  assert.equal((await client.subscription(id)).user, undefined);
  assert.equal(await client.unsubscribe(mine.endpoint), true);
  assert.equal(await client.unsubscribe(mine.endpoint), false);
  assert.equal(await client.unsubscribe(id), false);
  await client.subscribe(subscription(), { user, metadata: {} });
  assert.equal((await client.deleteUser(user)).subscriptions, 1);
});

test("a notification ends", async () => {
  const tag = `t${randomUUID()}`;
  const id = await client.subscribe(subscription(), { tags: [tag] });
  assert.equal((await client.notify({ title: "x", tags: tag, dryRun: true })).audience, 1);
  const more = { options: { icon: "/i.png" }, log: "all", ttl: 60 };
  const accepted = await client.notify({ title: "Hello", body: "World", url: "/news", tags: tag, ...more });
  const { state, outcomes } = await client.wait(accepted.id);
  assert.deepEqual([state, outcomes], ["done", { gone: 1 }]);
  assert.deepEqual((await client.deliveries(accepted.id)).map((one) => one.subscription), [id]);
  assert.deepEqual(await client.deliveries(accepted.id, "delivered"), []);
  assert.equal((await problem(client.subscription(id))).status, 404);
});

test("a notification is delivered", { skip: !DELIVERABLE }, async () => {
  const { id } = await client.notify({ title: "Hello", push: [JSON.parse(DELIVERABLE)] });
  assert.deepEqual((await client.wait(id)).outcomes, { delivered: 1 });
});

test("a scheduled notification is changed", async () => {
  const at = new Date(Date.now() + 86_400_000);
  const expires = new Date(Date.now() + 90_000_000);
  const { id } = await client.notify({ title: "Later", user: "nobody", at, expires, rate: 10, rampUp: "1s" });
  assert.equal(Date.parse((await client.notification(id)).at), at.getTime());
  assert.equal((await client.pause(id)).state, "paused");
  assert.equal((await client.resume(id)).state, "scheduled");
  assert.equal((await client.setRate(id, 5)).rate_wanted, 5);
  assert.equal((await client.setRate(id, null)).rate_wanted, undefined);
  assert.equal((await client.wait(id, 0.2)).state, "scheduled");
  assert.equal((await client.cancel(id)).state, "cancelled");
  const { next } = await client.notifications({ limit: 1 });
  assert.ok((await client.notifications({ limit: 1, cursor: next })).notifications[0].id < next);
});

test("a user token names a user", { skip: !SECRET }, async () => {
  const user = `bob ${randomUUID()}`;
  const token = Client.userToken(user, `${SECRET}\n`);
  const body = JSON.stringify({ subscription: subscription(), user, user_token: token });
  const headers = { "content-type": "application/json" };
  const answer = await fetch(`${URL_}/subscriptions`, { method: "POST", headers, body });
  assert.equal(answer.status, 201, await answer.text());
  assert.equal((await client.deleteUser(user)).subscriptions, 1);
});

test("problems name the field", async () => {
  const wrong = await problem(client.notify({ title: "", tags: "a and" }));
  assert.deepEqual([wrong.status, wrong.type, wrong.errors[0].position], [422, "about:blank", 5]);
  assert.deepEqual(wrong.fields, ["to.tags", "notification.title"]);
  assert.match(wrong.message, /to\.tags: wanted /);
  assert.ok(wrong.requestId);
  assert.deepEqual((await problem(client.notify({ title: "x" }))).fields, ["to"]);
  assert.deepEqual((await problem(client.notify({ title: "x", all: true, tags: "a" }))).fields, ["to"]);
  assert.deepEqual((await problem(client.notify({ title: "x", all: true, tll: 5 }))).fields, ["tll"]);
  const injected = await problem(client.notify({ title: "x", all: true, idempotencyKey: "a\nb: c" }));
  assert.deepEqual(injected.fields, ["Idempotency-Key"]);
  const broken = { ...subscription(), keys: { p256dh: "x", auth: "x" } };
  assert.match((await problem(client.subscribe(broken))).fields[0], /^subscription\.keys\./);
  assert.equal((await problem(client.notification("no such"))).status, 404);
  assert.equal((await problem(client.enqueue("no.such", {}, { unique: "a" }))).status, 404);
  assert.equal((await problem(new Client(URL_, "pk_wrong").pushKey())).status, 401);
});

test("no answer", async () => {
  const silent = net.createServer((socket) => socket.on("error", () => {}));
  const url = await listen(silent);
  let began = Date.now();
  const late = await problem(new Client(url, KEY, { timeout: 0.5, attempts: 1 }).pushKey());
  assert.ok(Date.now() - began < 2000);
  assert.deepEqual([late.status, late.detail], [0, `${url}: timed out`]);
  silent.close();
  began = Date.now();
  const refused = await problem(new Client(url, KEY, { patience: 2 }).pushKey());
  assert.ok(Date.now() - began < 3000);
  assert.equal(refused.status, 0);
  assert.match(refused.detail, /ECONNREFUSED/);
});

test("a repeated notification is one", async () => {
  const seen = await proxy("drop", "busy 1", "pass");
  const began = Date.now();
  const { id } = await new Client(seen.url, KEY).notify({ title: "x", user: "nobody", idempotencyKey: randomUUID() });
  assert.ok(Date.now() - began > 1000, "Retry-After is honoured");
  assert.deepEqual([seen.requests, seen.ids], [3, [id, id]]);
});

test("what is not repeated", async () => {
  let seen = await proxy("drop", "pass");
  const lost = await problem(new Client(seen.url, KEY).notify({ title: "x", user: "nobody" }));
  assert.deepEqual([lost.status, seen.requests], [0, 1]);
  seen = await proxy("busy 60", "pass");
  const busy = await problem(new Client(seen.url, KEY).logout(subscription()));
  assert.deepEqual([busy.status, busy.retryAfter, seen.requests], [503, 60, 1]);
});

test("the key is not shown", async () => {
  const inspected = (value) => inspect(value, { depth: null, showHidden: true });
  let shown = inspected(client) + JSON.stringify(client) + String(client);
  const { url } = await proxy("drop");
  for (const at of [URL_, "http://127.0.0.1:2", url]) {
    const failed = await problem(new Client(at, KEY, { attempts: 1 }).notify({ tags: "a" }));
    shown += inspected(failed) + failed.stack;
  }
  for (const bad of [["nonsense", KEY], [URL_, `${KEY}\n${KEY}`]]) {
    assert.throws(() => new Client(...bad), (error) => { shown += inspected(error); return true; });
  }
  assert.ok(!shown.includes(KEY), shown);
});
