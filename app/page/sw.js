// The service worker: shows what is pushed, and keeps the server informed when the browser renews.

/* global base64url, remember, remembered */
importScripts("/push.js");

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

/** What to show: our own notifications are JSON with a title, anything else is shown as it came. */
function read(data) {
  const text = data?.text() ?? "";
  try {
    const notification = JSON.parse(text);
    if (typeof notification?.title === "string") return notification;
  } catch {
    // Then it is text.
  }
  return { title: "Notification", body: text };
}

self.addEventListener("push", (event) => {
  const { title, url, ...options } = read(event.data);
  const tell = async () => {
    await self.registration.showNotification(title, { icon: "/icon.svg", ...options, data: { url } });
    for (const page of await self.clients.matchAll({ includeUncontrolled: true })) {
      page.postMessage({ title, body: options.body });
    }
  };
  event.waitUntil(tell());
});

self.addEventListener("notificationclick", (event) => {
  event.notification.close();
  const url = event.notification.data?.url;
  if (!url) return;
  const open = async () => {
    const { href: target, protocol } = new URL(url, self.location.origin);
    if (protocol !== "https:" && protocol !== "http:") return;
    const pages = await self.clients.matchAll({ type: "window", includeUncontrolled: true });
    const there = pages.find((page) => page.url === target);
    await (there ? there.focus() : self.clients.openWindow(target));
  };
  event.waitUntil(open());
});

self.addEventListener("pushsubscriptionchange", (event) => {
  const renew = async () => {
    const before = await remembered();
    const key = before?.key ?? (await (await fetch("/push/key")).json()).key;
    const subscription = event.newSubscription
      ?? await self.registration.pushManager.subscribe({ userVisibleOnly: true, applicationServerKey: key });
    const mine = subscription.toJSON();
    const old = event.oldSubscription?.toJSON();
    const replaces = old ? { endpoint: old.endpoint, auth: old.keys.auth }
      : before && { endpoint: before.endpoint, auth: before.auth };
    const made = subscription.options?.applicationServerKey;
    const body = { subscription: mine, key: made ? base64url(made) : key, replaces: replaces ?? undefined };
    const response = await fetch("/subscriptions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
    });
    if (response.ok) await remember({ endpoint: mine.endpoint, auth: mine.keys.auth, key: body.key });
  };
  event.waitUntil(renew());
});
