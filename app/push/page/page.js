// The page that subscribes this browser and sends it a notification. push.js comes before it.

/* global base64url, logout, remember, remembered */

const element = (id) => document.getElementById(id);
const ui = Object.fromEntries(
  ["state", "subscribe", "unsubscribe", "logout", "form", "title", "body", "key", "key-row", "send", "sent", "received", "nothing"]
    .map((id) => [id, element(id)]),
);

/** The id of this browser's subscription at the server, once it has one. */
let subscriptionId = null;

// The key comes in the fragment, which browsers send to nobody; it does not stay in the address bar.
const fragment = new URLSearchParams(location.hash.slice(1));
if (fragment.has("key")) {
  sessionStorage.setItem("key", fragment.get("key"));
  history.replaceState(null, "", location.pathname);
}
const apiKey = () => sessionStorage.getItem("key") || ui.key.value.trim();

function say(where, text, wrong = false) {
  where.textContent = text;
  where.classList.toggle("wrong", wrong);
}

/** Calls the server; an error has the server's words, if it has any for a person. */
async function call(method, path, body) {
  const headers = { "content-type": "application/json" };
  if (apiKey()) headers.authorization = `Bearer ${apiKey()}`;
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body) })
    .catch(() => { throw new Error("The server cannot be reached. Please try again."); });
  const answer = read(await response.text());
  if (response.status === 401) throw new Error(askForKey());
  if (!response.ok || answer === null) {
    // A proxy in front of the server answers in its own way.
    if (answer === null) throw new Error(`The server cannot be reached (${response.status}). Please try again.`);
    const fields = (answer.errors ?? []).map((error) => `${error.field}: ${error.wanted}`);
    throw new Error(fields.join("; ") || answer.detail || `The server answered ${response.status}.`);
  }
  return answer;
}

/** An answer of the server, or null when it is somebody else's. */
function read(text) {
  try {
    return text ? JSON.parse(text) : {};
  } catch {
    return null;
  }
}

/** What to do without a key that is good. */
function askForKey() {
  const had = Boolean(sessionStorage.getItem("key"));
  // The token of the start-up line is good for an hour.
  sessionStorage.removeItem("key");
  showKeyField();
  ui.key.focus();
  return had
    ? "The key is not good any more: enter an API key, or open the address that the server printed when it started."
    : "Sending takes an API key: enter one, or open the address that the server printed when it started.";
}

function showKeyField() {
  ui["key-row"].hidden = Boolean(sessionStorage.getItem("key"));
}

function show(subscribed) {
  // Whoever uses the keyboard goes on where he was.
  const had = document.activeElement;
  ui.subscribe.hidden = subscribed;
  ui.unsubscribe.hidden = !subscribed;
  ui.logout.hidden = !subscribed;
  ui.send.setAttribute("aria-disabled", String(!subscribed));
  if (had?.hidden) (subscribed ? ui.unsubscribe : ui.subscribe).focus();
}

/** Tells the server about the subscription, and what it replaces if the browser had another one. */
async function store(subscription, key) {
  const mine = subscription.toJSON();
  const before = await remembered();
  const replaces = before && before.endpoint !== mine.endpoint
    ? { endpoint: before.endpoint, auth: before.auth }
    : undefined;
  const { id } = await call("POST", "/subscriptions", { subscription: mine, key, replaces });
  await remember({ endpoint: mine.endpoint, auth: mine.keys.auth, key });
  subscriptionId = id;
  say(ui.state, "This browser is subscribed.");
  show(true);
}

/** A browser that cannot reach its push service may never answer. */
function within(seconds, promise) {
  const late = new Promise((_, reject) => {
    const text = "The browser's push service does not answer. Please try again.";
    setTimeout(() => reject(new Error(text)), seconds * 1000);
  });
  return Promise.race([promise, late]);
}

/** Asks the person, who may take any time; a promise to subscribe would count that, too. */
async function permission() {
  const answer = await Notification.requestPermission();
  if (answer === "granted") return;
  throw new Error(answer === "denied"
    ? "This browser does not let this page show notifications. Allow them in its settings for this page (the icon beside the address), and press Subscribe again."
    : "The browser has not been allowed to show notifications. Press Subscribe to be asked again.");
}

async function subscribe(registration) {
  // First: browsers ask only while they know that somebody has just clicked.
  await permission();
  const { key } = await call("GET", "/push/key");
  let subscription = await registration.pushManager.getSubscription();
  if (subscription && base64url(subscription.options.applicationServerKey) !== key) {
    // Made with another key of the server's: it can never be sent to again.
    await subscription.unsubscribe();
    subscription = null;
  }
  if (!subscription) {
    const made = registration.pushManager.subscribe({ userVisibleOnly: true, applicationServerKey: key });
    // One that comes late is stored all the same: the browser has it.
    let late = false;
    made.then((came) => late && store(came, key)).catch(() => {});
    try {
      subscription = await within(15, made);
    } catch (error) {
      late = true;
      throw error;
    }
  }
  await store(subscription, key);
}

async function unsubscribe(registration) {
  const subscription = await registration.pushManager.getSubscription();
  if (subscription) {
    const { endpoint, keys } = subscription.toJSON();
    await subscription.unsubscribe();
    // Gone here is gone: a server that has forgotten it already is no reason to complain.
    await call("DELETE", "/subscriptions", { endpoint, auth: keys.auth }).catch(() => {});
  }
  await remember(null);
  subscriptionId = null;
  say(ui.state, "This browser is not subscribed.");
  show(false);
}

/** Sends the form's notification to this browser, and follows it until it is done. */
async function send() {
  const notification = { title: ui.title.value, body: ui.body.value, url: "/" };
  const { id } = await call("POST", "/notify", {
    to: { subscriptions: [subscriptionId] },
    notification,
    ttl: 3600,
    urgency: "high",
  });
  for (let waited = 0; waited < 120; waited += 1) {
    const progress = await call("GET", `/notifications/${id}`);
    if (progress.state === "done") return progress;
    say(ui.sent, `${progress.state}…`);
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
  throw new Error(`not sent yet; look at /notifications/${id}`);
}

function describe({ audience, outcomes }) {
  const words = Object.entries(outcomes).map(([outcome, count]) => `${count} ${outcome.replace("_", " ")}`);
  return audience === 0 ? "Done: nobody to send to." : `Done: ${words.join(", ")}.`;
}

/** Runs what a button does: one at a time, and with its error beside it. */
function whenClicked(button, where, action) {
  button.addEventListener("click", async (event) => {
    event.preventDefault();
    // A button that is disabled would lose the focus of the keyboard.
    if (button.getAttribute("aria-disabled") === "true") return;
    if (button === ui.send && !ui.form.reportValidity()) return;
    button.setAttribute("aria-disabled", "true");
    say(where, "…");
    try {
      await action();
    } catch (error) {
      say(where, error.message, true);
    } finally {
      button.setAttribute("aria-disabled", String(button === ui.send && subscriptionId === null));
    }
  });
}

function note({ title, body }) {
  ui.nothing.hidden = true;
  const item = document.createElement("li");
  item.textContent = body ? `${title}: ${body}` : title;
  ui.received.prepend(item);
}

/** Why this browser cannot be subscribed here; nothing when it can. */
function obstacle() {
  if ("serviceWorker" in navigator && "PushManager" in window && "Notification" in window) return null;
  if (!window.isSecureContext) return "This page has to be opened with https, or from localhost.";
  if (/iPhone|iPad/.test(navigator.userAgent)) return "Add this page to the home screen and open it from there.";
  return "Web push is turned off in this browser, or there is none in its private windows.";
}

async function start() {
  say(ui.state, "Looking…");
  showKeyField();
  const why = obstacle();
  if (why) {
    say(ui.state, `This browser cannot be subscribed here. ${why}`, true);
    return;
  }
  navigator.serviceWorker.addEventListener("message", (event) => note(event.data));
  await navigator.serviceWorker.register("/sw.js");
  const registration = await navigator.serviceWorker.ready;
  whenClicked(ui.subscribe, ui.state, () => subscribe(registration));
  whenClicked(ui.unsubscribe, ui.state, () => unsubscribe(registration));
  whenClicked(ui.logout, ui.state, async () => {
    await logout(registration);
    say(ui.state, "This browser is subscribed, and belongs to no user.");
  });
  whenClicked(ui.send, ui.sent, async () => say(ui.sent, describe(await send())));
  const subscription = await registration.pushManager.getSubscription();
  if (!subscription) {
    say(ui.state, "This browser is not subscribed.");
    show(false);
    return;
  }
  // The server may have forgotten it, or be another one by now.
  await subscribe(registration);
}

start().catch((error) => {
  say(ui.state, error.message, true);
  show(false);
});
