// The page that subscribes this browser and sends it a notification. perennial.js is loaded before it.

/* global perennial */

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

// The key decides the site, also of the subscription.
perennial.headers = () => (apiKey() ? { authorization: `Bearer ${apiKey()}` } : {});

/** Awaits what was asked of the server. When it wants a key, the error says where to get one. */
async function withKey(asked) {
  try {
    return await asked;
  } catch (error) {
    throw error.status === 401 ? new Error(askForKey()) : error;
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

function showStored(id) {
  subscriptionId = id;
  say(ui.state, "This browser is subscribed.");
  show(true);
}

function subscribe(registration) {
  return withKey(perennial.subscribe({ registration, onStored: showStored }));
}

async function unsubscribe(registration) {
  await perennial.unsubscribe({ registration });
  subscriptionId = null;
  say(ui.state, "This browser is not subscribed.");
  show(false);
}

/** Sends the form's notification to this browser, and follows it until it is done. */
async function send() {
  const notification = { title: ui.title.value, body: ui.body.value, url: "/" };
  const to = { subscriptions: [subscriptionId] };
  const asked = { to, notification, ttl: 3600, urgency: "high" };
  const { id } = await withKey(perennial.request("POST", "notify", asked));
  for (let waited = 0; waited < 120; waited += 1) {
    const progress = await withKey(perennial.request("GET", `notifications/${id}`));
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

async function start() {
  say(ui.state, "Looking…");
  showKeyField();
  const why = perennial.obstacle();
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
    await withKey(perennial.logout({ registration }));
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
