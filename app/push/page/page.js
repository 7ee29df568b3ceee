// The page that subscribes this browser and sends it a notification. push.js is loaded before it.

/* global base64url, logout, remember, remembered */

const element = (id) => document.getElementById(id);
const ui = Object.fromEntries(
  ["state", "subscribe", "unsubscribe", "logout", "form", "title", "body", "key", "key-row", "send", "sent", "received", "nothing"]
    .map((id) => [id, element(id)]),
);

/** The id of this browser's subscription at the server, once it has one. */
let subscriptionId = null;

// The key comes in the fragment, which browsers never send; it does not stay in the address bar.
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

/** Calls the server. An error has the message of the server, if there is one. */
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

/** Reads an answer of the server; null when the answer comes from elsewhere and is not JSON. */
function read(text) {
  try {
    return text ? JSON.parse(text) : {};
  } catch {
    return null;
  }
}

/** Shows the field for a key, and returns the message about the missing or invalid one. */
function askForKey() {
  const had = Boolean(sessionStorage.getItem("key"));
  // The token of the start-up line is valid for an hour.
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
  // The focus of the keyboard stays at its place.
  const had = document.activeElement;
  ui.subscribe.hidden = subscribed;
  ui.unsubscribe.hidden = !subscribed;
  ui.logout.hidden = !subscribed;
  ui.send.setAttribute("aria-disabled", String(!subscribed));
  if (had?.hidden) (subscribed ? ui.unsubscribe : ui.subscribe).focus();
}

/** Stores the subscription at the server. It replaces an earlier one of this browser. */
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

/** Limits the time of a promise: a browser that cannot reach its push service may never answer. */
function within(seconds, promise) {
  const late = new Promise((_, reject) => {
    const text = "The browser's push service does not answer. Please try again.";
    setTimeout(() => reject(new Error(text)), seconds * 1000);
  });
  return Promise.race([promise, late]);
}

/** Asks for the permission. The person may take any time, which the time limit of subscribing must not count. */
async function permission() {
  const answer = await Notification.requestPermission();
  if (answer === "granted") return;
  throw new Error(answer === "denied"
    ? "This browser does not let this page show notifications. Allow them in its settings for this page (the icon beside the address), and press Subscribe again."
    : "The browser has not been allowed to show notifications. Press Subscribe to be asked again.");
}

async function subscribe(registration) {
  // This comes first: browsers ask only right after a click.
  await permission();
  const { key } = await call("GET", "/push/key");
  let subscription = await registration.pushManager.getSubscription();
  if (subscription && base64url(subscription.options.applicationServerKey) !== key) {
    // The subscription was made with another key of the server: it can never be sent to again.
    await subscription.unsubscribe();
    subscription = null;
  }
  if (!subscription) {
    const made = registration.pushManager.subscribe({ userVisibleOnly: true, applicationServerKey: key });
    // A subscription that comes late is stored all the same: the browser has it.
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
    // The browser has unsubscribed: it is no error when the server does not know the subscription any more.
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

/** Runs the action of a button: one at a time, and with its error beside it. */
function whenClicked(button, where, action) {
  button.addEventListener("click", async (event) => {
    event.preventDefault();
    // A disabled button would lose the focus of the keyboard.
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

/** The reason why this browser cannot be subscribed here; null when it can. */
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
  // The server may not know the subscription any more, or be another server by now.
  await subscribe(registration);
}

start().catch((error) => {
  say(ui.state, error.message, true);
  show(false);
});
