// Functions that the page and its service worker share. A plain script: not every browser has modules in workers.

/** Bytes as base64url without padding. */
function base64url(bytes) {
  const text = String.fromCharCode(...new Uint8Array(bytes ?? []));
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

// When a browser renews a subscription by itself, `oldSubscription` is often null: the endpoint and the
// secret that prove which subscription it was are stored here.

function openStore() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("perennial", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("push");
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function withinStore(mode, work) {
  const database = await openStore();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction("push", mode);
      const request = work(transaction.objectStore("push"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = () => reject(transaction.error);
      transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

/** Stores `{endpoint, auth, key}` of this browser's subscription; deletes it when there is none. */
function remember(subscription) {
  return withinStore("readwrite", (store) => (subscription ? store.put(subscription, "mine") : store.delete("mine")));
}

/** The stored value. */
function remembered() {
  return withinStore("readonly", (store) => store.get("mine"));
}

/** Tells the server that this browser has no user any more. It stays subscribed; the data of its user is deleted. */
async function logout(registration) {
  const subscription = await registration.pushManager.getSubscription();
  if (!subscription) return;
  const key = base64url(subscription.options?.applicationServerKey);
  const response = await fetch("/subscriptions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ subscription: subscription.toJSON(), key: key || undefined, user: null }),
  });
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
}
