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

/** Calls the server; an error has the server's words. */
async function call(method, path, body) {
  const headers = { "content-type": "application/json" };
  if (apiKey()) headers.authorization = `Bearer ${apiKey()}`;
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  const text = await response.text();
  const answer = text ? JSON.parse(text) : {};
  if (response.status === 401 && sessionStorage.getItem("key")) {
    // The token of the start-up line is good for an hour.
    sessionStorage.removeItem("key");
    showKeyField();
  }
  if (!response.ok) {
    const fields = (answer.errors ?? []).map((error) => `${error.field}: ${error.wanted}`);
    throw new Error(fields.join("; ") || answer.detail || response.statusText);
  }
  return answer;
}

function showKeyField() {
  ui["key-row"].hidden = Boolean(sessionStorage.getItem("key"));
}

function show(subscribed) {
  ui.subscribe.hidden = subscribed;
  ui.unsubscribe.hidden = !subscribed;
  ui.logout.hidden = !subscribed;
  ui.send.disabled = !subscribed;
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

async function subscribe(registration) {
  const { key } = await call("GET", "/push/key");
  let subscription = await registration.pushManager.getSubscription();
  if (subscription && base64url(subscription.options.applicationServerKey) !== key) {
    // Made with another key of the server's: it can never be sent to again.
    await subscription.unsubscribe();
    subscription = null;
  }
  subscription ??= await within(15, registration.pushManager.subscribe({
    userVisibleOnly: true,
    applicationServerKey: key,
  }));
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
    if (button === ui.send && !ui.form.reportValidity()) return;
    button.disabled = true;
    say(where, "…");
    try {
      await action();
    } catch (error) {
      say(where, error.message, true);
    } finally {
      button.disabled = button === ui.send && subscriptionId === null;
    }
  });
}

function note({ title, body }) {
  ui.nothing.hidden = true;
  const item = document.createElement("li");
  item.textContent = body ? `${title}: ${body}` : title;
  ui.received.prepend(item);
}

async function start() {
  showKeyField();
  if (!("serviceWorker" in navigator) || !("PushManager" in window)) {
    const apple = /iPhone|iPad/.test(navigator.userAgent);
    const hint = apple ? "Add this page to the home screen and open it from there." : "It needs https, or localhost.";
    say(ui.state, `This browser has no web push here. ${hint}`, true);
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
