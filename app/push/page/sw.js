// The service worker: shows pushed messages, and tells the server when the browser renews the subscription.

/* global perennial */
importScripts("/perennial.js");

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

/** Reads the notification to show: JSON with a title, or a declarative one inside it. Other text is shown as is. */
function read(data) {
  const text = data?.text() ?? "";
  try {
    const message = JSON.parse(text);
    // Browsers that know Declarative Web Push show it themselves; the others hand it over (Push API, section 3.3).
    if (message?.web_push === 8030 && typeof message.notification?.title === "string") {
      const { navigate, ...notification } = message.notification;
      return { url: navigate, ...notification, app_badge: message.app_badge };
    }
    if (typeof message?.title === "string") return message;
  } catch {
    // The message is plain text.
  }
  return { title: "Notification", body: text };
}

/** The caller's data, with the URLs that a click on the notification or on one of its actions opens. */
function dataOf({ data, url, actions }) {
  const own = data !== null && typeof data === "object" && !Array.isArray(data) ? data : { value: data };
  const urls = (actions ?? []).filter(({ navigate, url: of }) => navigate ?? of);
  const actionUrls = Object.fromEntries(urls.map(({ action, navigate, url: of }) => [action, navigate ?? of]));
  return { ...own, ...(url === undefined ? {} : { url }), ...(urls.length ? { actionUrls } : {}) };
}

self.addEventListener("push", (event) => {
  const { title, url, app_badge: badge, ...options } = read(event.data);
  const tell = async () => {
    const data = dataOf({ ...options, url });
    await self.registration.showNotification(title, { icon: "/icon.svg", ...options, data });
    if (Number.isInteger(badge)) await navigator.setAppBadge?.(badge).catch(() => {});
    for (const page of await self.clients.matchAll({ includeUncontrolled: true })) {
      page.postMessage({ title, body: options.body });
    }
  };
  event.waitUntil(tell());
});

self.addEventListener("notificationclick", (event) => {
  event.notification.close();
  const data = event.notification.data;
  const url = data?.actionUrls?.[event.action] ?? data?.url;
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

// A page signs its user out with navigator.serviceWorker.controller.postMessage({ type: "logout" }).
self.addEventListener("message", (event) => {
  if (event.data?.type === "logout") event.waitUntil(perennial.logout());
});

self.addEventListener("pushsubscriptionchange", (event) => event.waitUntil(perennial.renew(event)));
