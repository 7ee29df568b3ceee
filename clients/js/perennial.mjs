// A client of Perennial's HTTP interface, for a backend: Node 18, and nothing besides. perennial.d.mts has the types,
// and ../README.md says what is repeated, and when.

import { createHmac } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";

const TRANSIENT = [0, 429, 502, 503, 504];
const ENDED = ["done", "cancelled", "expired"];

/** A failed call: the problem document of the server (RFC 9457); the status is 0 when no answer came. */
export class Problem extends Error {
  constructor(status, title, detail = "", errors = [], more = {}) {
    const { retryAfter = null, type = "about:blank", requestId = null } = more;
    const wanted = errors.map((error) => `; ${error.field}: wanted ${error.wanted}`).join("");
    super(`${status} ${title}${detail && `: ${detail}`}${wanted}`);
    this.name = "Problem";
    Object.assign(this, { status, title, detail, errors, retryAfter, type, requestId });
  }

  /** The names of the fields that are not as wanted. */
  get fields() {
    return this.errors.map((error) => error.field);
  }

  /** Whether a repetition may help. A 409 with Retry-After is a notification that is being accepted now. */
  get isTransient() {
    return TRANSIENT.includes(this.status) || (this.status === 409 && this.retryAfter !== null);
  }
}

/**
 * A client of the server at `url`, such as https://push.example.com. `timeout` is the longest time of one request,
 * `attempts` the largest number of requests of one call, and `patience` the longest time of one call with all its
 * requests and the pauses between them; in seconds.
 */
export class Client {
  // Private fields are in no output of console.log, util.inspect or JSON.stringify.
  #url;
  #key;
  #limits;

  constructor(url, key, { timeout = 10, attempts = 4, patience = 30 } = {}) {
    if (!/^[!-~]+$/.test(key.trim())) throw new TypeError("an API key has printable characters only");
    this.#url = new URL(url).href.replace(/\/+$/, "");
    this.#key = key.trim();
    this.#limits = { timeout, attempts, patience };
  }

  /**
   * Sends a notification to one audience: `all`, `user`, `users`, `tags`, `subscriptions` or `push`. With an
   * idempotency key, the same call within 24 hours sends nothing more and returns the same id.
   */
  async notify({
    all, user, users, tags, subscriptions, push, title, body, url, options, idempotencyKey, rampUp, dryRun, ...rest
  }) {
    if (idempotencyKey !== undefined && !/^[ -~]{1,255}$/.test(idempotencyKey)) {
      const error = { field: "Idempotency-Key", wanted: "1 to 255 printable characters" };
      throw new Problem(422, "Unprocessable Entity", "not as wanted: Idempotency-Key", [error]);
    }
    const notification = { ...options, ...given({ title, body, url }) };
    const request = {
      to: given({ all: all || undefined, user, users, tags, subscriptions, push }),
      notification: Object.keys(notification).length ? notification : undefined,
      ramp_up: rampUp,
      dry_run: dryRun,
      ...rest,
    };
    return this.#call("POST", "/notify", request, { repeatable: idempotencyKey !== undefined, idempotencyKey });
  }

  /** The state of a notification, and its outcomes so far. */
  notification(id) {
    return this.#call("GET", path("notifications", id));
  }

  /** Notifications, the newest first: `notifications`, and `next`, the cursor of the next page. */
  notifications({ cursor, limit } = {}) {
    return this.#call("GET", `/notifications${query({ cursor, limit })}`);
  }

  /** Waits until a notification has ended, or until so many seconds are over, and returns its state. */
  async wait(id, seconds = 60) {
    const end = now() + seconds;
    for (let pause = 0.1; ; pause = Math.min(2, pause * 1.5)) {
      const found = await this.notification(id);
      const left = end - now();
      if (left <= 0 || ENDED.includes(found.state)) return found;
      await sleep(1000 * Math.min(pause, left));
    }
  }

  pause(id) {
    return this.#call("POST", path("notifications", id, "pause"), undefined, { repeatable: true });
  }

  resume(id) {
    return this.#call("POST", path("notifications", id, "resume"), undefined, { repeatable: true });
  }

  cancel(id) {
    return this.#call("POST", path("notifications", id, "cancel"), undefined, { repeatable: true });
  }

  /** Changes the sends per second; null is as fast as push services take them. */
  setRate(id, rate) {
    return this.#call("PATCH", path("notifications", id), { rate }, { repeatable: true });
  }

  /** The logged deliveries of a notification: failures, or all if it was sent with `log: "all"`. */
  deliveries(id, outcome) {
    return this.#call("GET", path("notifications", id, "deliveries") + query({ outcome }));
  }

  /** The applicationServerKey that pages subscribe with. */
  async pushKey() {
    return (await this.#call("GET", "/push/key")).key;
  }

  /**
   * Stores a subscription in the form of a browser's `PushSubscription.toJSON()`, and returns its id. What is not given
   * stays as it is stored. `key` is the applicationServerKey that the subscription was made with; `replaces` has
   * `endpoint` and `auth` of the subscription that the browser had before.
   */
  async subscribe(subscription, { key, user, tags, metadata, replaces } = {}) {
    const request = given({ subscription, key, user, tags, metadata, replaces });
    return (await this.#call("POST", "/subscriptions", request, { repeatable: true })).id;
  }

  /** Takes its user, and the tags and metadata of that user, off a subscription, which stays. */
  async logout(subscription) {
    return (await this.#call("POST", "/subscriptions", { subscription, user: null }, { repeatable: true })).id;
  }

  /** Deletes a subscription by its id or its endpoint; false when there is none. */
  async unsubscribe(which) {
    const isId = typeof which === "number";
    const body = isId ? undefined : { endpoint: which };
    try {
      await this.#call("DELETE", isId ? `/subscriptions/${which}` : "/subscriptions", body, { repeatable: true });
      return true;
    } catch (problem) {
      if (problem.status === 404) return false;
      throw problem;
    }
  }

  subscription(id) {
    return this.#call("GET", `/subscriptions/${id}`);
  }

  /** Subscriptions in the order of their ids: `subscriptions`, and `next`, the cursor of the next page. */
  subscriptions({ user, tag, endpoint, cursor, limit } = {}) {
    return this.#call("GET", `/subscriptions${query({ user, tag, endpoint, cursor, limit })}`);
  }

  /** Everything that is stored about a user. */
  user(user) {
    return this.#call("GET", path("users", user));
  }

  /** Deletes everything that is stored about a user, and returns the numbers of subscriptions and deliveries. */
  deleteUser(user) {
    return this.#call("DELETE", path("users", user), undefined, { repeatable: true });
  }

  /** Makes the token with which a page may name this user. The secret is that of `sites.SITE.user_secret_file`. */
  static userToken(user, secret, { site = "default", seconds = 3600 } = {}) {
    const expires = Math.floor(Date.now() / 1000) + seconds;
    const signature = createHmac("sha256", secret.replace(/[\r\n]+$/, "")).update(`v1.${site}.${expires}.${user}`);
    return `v1.${expires}.${signature.digest("base64url")}`;
  }

  /**
   * Enqueues a job of a public kind, and returns its id: the id of another job, while one of this kind with this unique
   * key has not ended.
   */
  async enqueue(kind, payload, { delay, unique, priority } = {}) {
    return (await this.#call("POST", path("jobs", kind), { payload, delay, unique, priority })).id;
  }

  /** Sends a request, and repeats it within the attempts and the patience if that is safe and may help. */
  async #call(method, path, body, { repeatable = method === "GET", idempotencyKey } = {}) {
    const { attempts, patience } = this.#limits;
    const end = now() + patience;
    for (let attempt = 1; ; attempt += 1) {
      try {
        return await this.#send(method, path, body, idempotencyKey, end - now());
      } catch (problem) {
        const pause = (problem.retryAfter ?? 0) + Math.min(8, 2 ** (attempt - 3)) * (0.5 + Math.random() / 2);
        const mayHelp = repeatable && problem.isTransient && attempt < attempts;
        if (!mayHelp || now() + pause >= end) throw problem;
        await sleep(1000 * pause);
      }
    }
  }

  async #send(method, path, body, idempotencyKey, left) {
    const headers = { authorization: `Bearer ${this.#key}`, "content-type": "application/json" };
    if (idempotencyKey !== undefined) headers["idempotency-key"] = idempotencyKey;
    const signal = AbortSignal.timeout(Math.max(1, Math.floor(1000 * Math.min(this.#limits.timeout, left))));
    const text = body && JSON.stringify(body);
    let response, data;
    try {
      // A redirect would take the request elsewhere.
      response = await fetch(this.#url + path, { method, headers, body: text, redirect: "manual", signal });
      data = await response.text();
    } catch (error) {
      // The reason is in the cause: "fetch failed" alone says nothing.
      const { message, cause } = error;
      const reason = error.name === "TimeoutError" ? "timed out" : cause?.message || cause?.code || message;
      throw new Problem(0, "No Answer", `${this.#url}: ${reason}`);
    }
    const mediaType = response.headers.get("content-type") ?? "";
    const answer = read(data, mediaType);
    if (response.ok && answer !== null) return answer;
    // A problem without a type is about:blank (RFC 9457, section 4.2.1), and a proxy answers in its own way.
    const problem = mediaType.startsWith("application/problem+json") ? answer ?? {} : {};
    const { title = "Unexpected Answer", detail, errors, type } = problem;
    const retryAfter = seconds(response.headers.get("retry-after"));
    const requestId = response.headers.get("x-request-id");
    throw new Problem(response.status, title, detail, errors, { retryAfter, type, requestId });
  }
}

/** An answer as a value; null when it is no JSON. */
function read(text, mediaType) {
  try {
    const isList = mediaType.startsWith("application/x-ndjson");
    return JSON.parse(isList ? `[${text.trim().replaceAll("\n", ",")}]` : text || "{}");
  } catch {
    return null;
  }
}

/** Seconds, or the seconds until a date (RFC 9110, section 10.2.3). */
function seconds(retryAfter) {
  if (retryAfter === null || /^\d+$/.test(retryAfter)) return retryAfter && Number(retryAfter);
  return Math.max(0, Math.round((Date.parse(retryAfter) - Date.now()) / 1000)) || 0;
}

const now = () => performance.now() / 1000;
const given = (values) => Object.fromEntries(Object.entries(values).filter(([, value]) => (value ?? null) !== null));
const path = (...parts) => `/${parts.map(encodeURIComponent).join("/")}`;
const query = (values) => `?${new URLSearchParams(given(values))}`;
