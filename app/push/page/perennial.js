// The browser's part of web push, for the pages and the service worker of any site:
//
//   perennial.subscribe({ user, userToken, tags, metadata })   after a click: asks, subscribes, returns the id
//   perennial.renew()           at each visit; in the service worker, renew(event) at pushsubscriptionchange
//   perennial.login(user, userToken), perennial.logout(), perennial.unsubscribe()
//
// The server is the one that this script comes from, or that data-server of the script element names. A service worker
// knows it from the last subscription. This is a plain script, because not every browser has modules in workers.

(() => {
  const isPage = typeof document !== "undefined";
  const script = isPage ? document.currentScript : null;

  const perennial = {
    /** URL of the server. Null in a service worker, which then uses the server of the last subscription. */
    server: isPage ? script?.dataset.server ?? new URL(".", script?.src || location.origin).href : null,
    /** Further headers of each request. An operator's page adds its API key here; a page for visitors has none. */
    headers: () => ({}),
    request, subscribe, renew, login, logout, unsubscribe, subscription, obstacle,
    /** Functions that /push.js offers under their old names. */
    former: { base64url, remember, remembered },
  };
  self.perennial = perennial;

  /** Calls the server. An error has the message of the server, its `status` and its `problem`, if there is one. */
  async function request(method, path, body) {
    const base = perennial.server ?? (await remembered())?.server ?? location.origin;
    const headers = { ...(body && { "content-type": "application/json" }), ...perennial.headers() };
    const init = { method, headers, body: body && JSON.stringify(body), signal: AbortSignal.timeout?.(30000) };
    const response = await fetch(`${base.replace(/\/+$/, "")}/${path}`, init)
      .catch(() => { throw new Error("The server cannot be reached. Please try again."); });
    const answer = read(await response.text());
    if (response.ok && answer !== null) return answer;
    const fields = (answer?.errors ?? []).map((error) => `${error.field}: ${error.wanted}`);
    // A proxy in front of the server answers in its own way.
    const text = answer === null ? `The server cannot be reached (${response.status}). Please try again.`
      : fields.join("; ") || answer.detail || `The server answered ${response.status}.`;
    throw Object.assign(new Error(text), { status: response.status, problem: answer });
  }

  /** Reads an answer of the server; null when the answer comes from elsewhere and is not JSON. */
  function read(text) {
    try {
      return text ? JSON.parse(text) : {};
    } catch {
      return null;
    }
  }

  /** The reason why this browser cannot be subscribed here; null when it can. */
  function obstacle() {
    if ("serviceWorker" in navigator && "PushManager" in self && "Notification" in self) return null;
    if (!self.isSecureContext) return "This page has to be opened with https, or from localhost.";
    if (/iPhone|iPad/.test(navigator.userAgent)) return "Add this page to the home screen and open it from there.";
    return "Web push is turned off in this browser, or there is none in its private windows.";
  }

  /**
   * Asks for the permission, subscribes this browser, stores the subscription at the server and returns its id.
   * Browsers ask only right after a click. `worker` is the path of the service worker, or `registration` its
   * registration; `onStored` is called with the id, even if the browser's push service answers after this has failed.
   */
  async function subscribe({ worker = "/sw.js", registration, onStored, ...data } = {}) {
    const why = obstacle();
    if (why) throw new Error(why);
    // This comes first, and without a time limit: the person may take any time.
    await permission();
    return subscribed(registration ?? await registered(worker), data, onStored);
  }

  async function permission() {
    const answer = await Notification.requestPermission();
    if (answer === "granted") return;
    throw new Error(answer === "denied"
      ? "This browser does not let this page show notifications. Allow them in its settings for this page (the icon beside the address), and press Subscribe again."
      : "The browser has not been allowed to show notifications. Press Subscribe to be asked again.");
  }

  /** Registers the service worker, and waits until it is active: without an active one, browsers do not subscribe. */
  async function registered(worker) {
    const registration = await navigator.serviceWorker.register(worker);
    const pending = registration.installing ?? registration.waiting;
    const active = new Promise((resolve) => {
      if (registration.active) resolve();
      else pending?.addEventListener("statechange", () => pending.state === "activated" && resolve());
    });
    await within(15, active, "The service worker does not start. Please try again.");
    return registration;
  }

  async function subscribed(registration, data, onStored = () => {}) {
    const { key } = await request("GET", "push/key");
    let mine = await registration.pushManager.getSubscription();
    if (mine && keyOf(mine) !== key) {
      // The subscription was made with another key of the server, or for another server.
      await mine.unsubscribe();
      mine = null;
    }
    const keep = async (came) => {
      const id = await store(came, key, data);
      onStored(id);
      return id;
    };
    if (mine) return keep(mine);
    const made = registration.pushManager.subscribe({ userVisibleOnly: true, applicationServerKey: key });
    // A subscription that comes late is stored all the same: the browser has it.
    let late = false;
    made.then((came) => late && keep(came)).catch(() => {});
    try {
      mine = await within(15, made, "The browser's push service does not answer. Please try again.");
    } catch (error) {
      late = true;
      throw error;
    }
    return keep(mine);
  }

  /** Limits the time of a promise: a browser that cannot reach its push service may never answer. */
  function within(seconds, promise, text) {
    const late = new Promise((_, reject) => { setTimeout(() => reject(new Error(text)), seconds * 1000); });
    return Promise.race([promise, late]);
  }

  /** Stores the subscription at the server. It replaces an earlier one of this browser. */
  async function store(mine, key, { user, userToken, tags, metadata } = {}, old = undefined) {
    const subscription = mine.toJSON();
    const { endpoint, keys: { auth } } = subscription;
    const memory = await remembered();
    const before = old ?? memory;
    const isOther = before && before.endpoint !== endpoint;
    const replaces = isOther ? { endpoint: before.endpoint, auth: before.auth } : undefined;
    const body = { subscription, key, user, user_token: userToken, tags, metadata, replaces };
    const { id } = await request("POST", "subscriptions", body);
    await remember({ endpoint, auth, key, server: perennial.server ?? memory?.server });
    return id;
  }

  /**
   * Brings the subscription up to date, without asking, and returns its id; null when there is none. A page calls it at
   * each visit, since some browsers drop subscriptions without an event; a service worker at pushsubscriptionchange.
   */
  async function renew(event, { registration } = {}) {
    const found = await registrationOf(registration);
    if (isPage) {
      const known = await found?.pushManager.getSubscription() ?? await remembered();
      return found && known && Notification.permission === "granted" ? subscribed(found, {}) : null;
    }
    const before = await remembered();
    const key = before?.key ?? (await request("GET", "push/key")).key;
    const mine = event?.newSubscription
      ?? await found.pushManager.subscribe({ userVisibleOnly: true, applicationServerKey: key });
    // `oldSubscription` is often null, although the browser has renewed the subscription: hence the memory below.
    const old = event?.oldSubscription?.toJSON();
    const replaced = old && { endpoint: old.endpoint, auth: old.keys.auth };
    // No person sees a failure here, and the next visit may be far away: what may pass is tried again.
    for (let pause = 2; ; pause *= 2) {
      try {
        return await store(mine, keyOf(mine) ?? key, {}, replaced);
      } catch (error) {
        const mayPass = [undefined, 429, 502, 503, 504].includes(error.status);
        if (!mayPass || pause > 8) throw error;
        await new Promise((resolve) => { setTimeout(resolve, 1000 * pause * (0.5 + Math.random() / 2)); });
      }
    }
  }

  /** Names the user of this browser, with a token of the backend. Returns null when the browser is not subscribed. */
  function login(user, userToken, { registration } = {}) {
    return update({ user, userToken }, registration);
  }

  /** Tells the server that this browser has no user any more. It stays subscribed; the data of its user is deleted. */
  function logout({ registration } = {}) {
    return update({ user: null }, registration);
  }

  async function update(data, registration) {
    const mine = await subscription({ registration });
    return mine && store(mine, keyOf(mine), data);
  }

  async function unsubscribe({ registration } = {}) {
    const mine = await subscription({ registration });
    if (mine) {
      const { endpoint, keys } = mine.toJSON();
      await mine.unsubscribe();
      // The browser has unsubscribed: it is no error when the server does not know the subscription any more.
      await request("DELETE", "subscriptions", { endpoint, auth: keys.auth }).catch(() => {});
    }
    await remember(null);
  }

  /** The browser's own subscription, or null. */
  async function subscription({ registration } = {}) {
    return await (await registrationOf(registration))?.pushManager.getSubscription() ?? null;
  }

  async function registrationOf(given) {
    return given ?? (isPage ? await navigator.serviceWorker?.getRegistration() : self.registration);
  }

  /** The applicationServerKey of a subscription, if the browser tells it. */
  function keyOf(mine) {
    return base64url(mine.options?.applicationServerKey) || undefined;
  }

  /** Bytes as base64url without padding. */
  function base64url(bytes) {
    const text = String.fromCharCode(...new Uint8Array(bytes ?? []));
    return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
  }

  // The endpoint and the secret that prove which subscription this browser had, its key, and its server.

  /** Stores `{endpoint, auth, key, server}` of this browser's subscription; deletes it when there is none. */
  function remember(mine) {
    return withinStore("readwrite", (memory) => (mine ? memory.put(mine, "mine") : memory.delete("mine")));
  }

  /** The stored value. */
  function remembered() {
    return withinStore("readonly", (memory) => memory.get("mine"));
  }

  async function withinStore(mode, work) {
    const database = await new Promise((resolve, reject) => {
      const opening = indexedDB.open("perennial", 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore("push");
      opening.onsuccess = () => resolve(opening.result);
      opening.onerror = () => reject(opening.error);
    });
    try {
      return await new Promise((resolve, reject) => {
        const transaction = database.transaction("push", mode);
        const working = work(transaction.objectStore("push"));
        transaction.oncomplete = () => resolve(working.result);
        transaction.onerror = () => reject(transaction.error);
        transaction.onabort = () => reject(transaction.error);
      });
    } finally {
      database.close();
    }
  }
})();
