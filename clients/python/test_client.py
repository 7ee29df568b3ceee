"""Walks through the client against a running server. It needs the environment

PERENNIAL_URL           URL of the server
PERENNIAL_KEY           an API key with all scopes
PERENNIAL_ENDPOINT      URL below which the push service of the server has no subscription
PERENNIAL_SUBSCRIPTION  the JSON of a subscription that gets its messages; without it, no delivery is tried
PERENNIAL_USER_SECRET   the secret of user tokens; without it, no user token is tried
"""

import json
import os
import re
import socket
import threading
import time
import traceback
import unittest
import urllib.request
import uuid
from datetime import datetime, timedelta, timezone

from perennial import Client, Problem

URL, KEY, ENDPOINT = (os.environ[f"PERENNIAL_{name}"] for name in ("URL", "KEY", "ENDPOINT"))
CLIENT = Client(URL, KEY)


def subscription():
    """A valid subscription that the push service does not know. The keys are those of RFC 8291, section 5."""
    p256dh = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4"
    return {"endpoint": f"{ENDPOINT}{uuid.uuid4().hex}", "keys": {"p256dh": p256dh, "auth": "BTBZMqHH6r4Tts7J_aSIgg"}}


class Proxy:
    """A proxy that does one thing with each request: `pass` it, `drop` its answer, or refuse it as `busy N` seconds."""

    def __init__(self, *actions):
        self.ids, self.requests = [], 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.run, args=(actions,), daemon=True).start()

    def run(self, actions):
        for action in actions:
            with self.listener.accept()[0] as client:
                request = b""
                while not re.search(rb"\r\n\r\n", request):
                    request += client.recv(65536)
                head, body = request.split(b"\r\n\r\n", 1)
                length = int(re.search(rb"content-length: (\d+)", head, re.I)[1])
                while len(body) < length:
                    body += client.recv(65536)
                self.requests += 1
                name, _, seconds = action.partition(" ")
                if name == "busy":
                    client.sendall(f"HTTP/1.1 503 Busy\r\nRetry-After: {seconds}\r\nContent-Length: 0\r\n\r\n".encode())
                    continue
                host, port = URL.split("://")[1].split(":")
                with socket.create_connection((host, int(port))) as server:
                    server.sendall(head + b"\r\n\r\n" + body)
                    answer = b"".join(iter(lambda: server.recv(65536), b""))
                self.ids.append(json.loads(answer.split(b"\r\n\r\n", 1)[1])["id"])
                if name == "pass":
                    client.sendall(answer)
        self.listener.close()


class Test(unittest.TestCase):
    def problem(self, call, *arguments, wanted=Problem, **named):
        # assertRaises would take the traceback away, in which the key is looked for.
        try:
            call(*arguments, **named)
        except wanted as problem:
            return problem
        self.fail("there is no problem")

    def test_subscriptions(self):
        user, tag, mine = f"ann/ü {uuid.uuid4().hex}", f"t{uuid.uuid4().hex}", subscription()
        id = CLIENT.subscribe(mine, key=CLIENT.push_key(), user=user, tags=[tag], metadata={"name": "Ann"})
        self.assertEqual(CLIENT.subscribe(mine), id)
        stored = CLIENT.subscription(id)
        self.assertEqual((stored["user"], stored["tags"], stored["metadata"]), (user, [tag], {"name": "Ann"}))
        for filter in ({"user": user}, {"tag": tag}, {"endpoint": mine["endpoint"]}):
            self.assertEqual([one["id"] for one in CLIENT.subscriptions(**filter)["subscriptions"]], [id])
        self.assertEqual(CLIENT.user(user)["subscriptions"][0]["id"], id)
        self.assertEqual(CLIENT.logout(mine), id)
        self.assertNotIn("user", CLIENT.subscription(id))
        self.assertTrue(CLIENT.unsubscribe(mine["endpoint"]))
        self.assertFalse(CLIENT.unsubscribe(mine["endpoint"]))
        self.assertFalse(CLIENT.unsubscribe(id))
        CLIENT.subscribe(subscription(), user=user, metadata={})
        self.assertEqual(CLIENT.delete_user(user)["subscriptions"], 1)

    def test_a_notification_ends(self):
        tag, mine = f"t{uuid.uuid4().hex}", subscription()
        id = CLIENT.subscribe(mine, tags=[tag])
        self.assertEqual(CLIENT.notify("x", tags=tag, dry_run=True)["audience"], 1)
        accepted = CLIENT.notify("Hello", "World", "/news", tags=tag, options={"icon": "/i.png"}, log="all", ttl=60)
        ended = CLIENT.wait(accepted["id"])
        self.assertEqual((ended["state"], ended["outcomes"]), ("done", {"gone": 1}))
        self.assertEqual([one["subscription"] for one in CLIENT.deliveries(accepted["id"])], [id])
        self.assertEqual(CLIENT.deliveries(accepted["id"], "delivered"), [])
        self.assertEqual(self.problem(CLIENT.subscription, id).status, 404)

    @unittest.skipUnless("PERENNIAL_SUBSCRIPTION" in os.environ, "there is no subscription to deliver to")
    def test_a_notification_is_delivered(self):
        accepted = CLIENT.notify("Hello", push=[json.loads(os.environ["PERENNIAL_SUBSCRIPTION"])])
        self.assertEqual(CLIENT.wait(accepted["id"])["outcomes"], {"delivered": 1})

    def test_a_scheduled_notification_is_changed(self):
        at = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=1)
        id = CLIENT.notify("Later", user="nobody", at=at, expires=at + timedelta(hours=1), rate=10, ramp_up="1s")["id"]
        self.assertEqual(CLIENT.notification(id)["at"], at.isoformat().replace("+00:00", "Z"))
        self.assertEqual(CLIENT.pause(id)["state"], "paused")
        self.assertEqual(CLIENT.resume(id)["state"], "scheduled")
        self.assertEqual(CLIENT.set_rate(id, 5)["rate_wanted"], 5)
        self.assertNotIn("rate_wanted", CLIENT.set_rate(id, None))
        self.assertEqual(CLIENT.wait(id, 0.2)["state"], "scheduled")
        self.assertEqual(CLIENT.cancel(id)["state"], "cancelled")
        page = CLIENT.notifications(limit=1)
        self.assertLess(CLIENT.notifications(limit=1, cursor=page["next"])["notifications"][0]["id"], page["next"])

    @unittest.skipUnless("PERENNIAL_USER_SECRET" in os.environ, "there is no secret of user tokens")
    def test_a_user_token_names_a_user(self):
        user = f"bob {uuid.uuid4().hex}"
        token = Client.user_token(user, os.environ["PERENNIAL_USER_SECRET"] + "\n")
        body = {"subscription": subscription(), "user": user, "user_token": token}
        headers = {"content-type": "application/json"}
        page = urllib.request.Request(f"{URL}/subscriptions", json.dumps(body).encode(), headers)
        self.assertEqual(urllib.request.urlopen(page).status, 201)
        self.assertEqual(CLIENT.delete_user(user)["subscriptions"], 1)

    def test_problems_name_the_field(self):
        problem = self.problem(CLIENT.notify, "", tags="a and")
        self.assertEqual((problem.status, problem.type), (422, "about:blank"))
        self.assertEqual(problem.fields, ["to.tags", "notification.title"])
        self.assertEqual(problem.errors[0]["position"], 5)
        self.assertIn("to.tags: wanted ", str(problem))
        self.assertTrue(problem.request_id)
        self.assertEqual(self.problem(CLIENT.notify, "x").fields, ["to"])
        self.assertEqual(self.problem(CLIENT.notify, "x", all=True, tags="a").fields, ["to"])
        injected = self.problem(CLIENT.notify, "x", all=True, idempotency_key="a\nb: c")
        self.assertEqual(injected.fields, ["Idempotency-Key"])
        broken = {**subscription(), "keys": {"p256dh": "x", "auth": "x"}}
        self.assertEqual(self.problem(CLIENT.subscribe, broken).fields[0][:18], "subscription.keys.")
        self.assertEqual(self.problem(CLIENT.notification, "no such").status, 404)
        self.assertEqual(self.problem(CLIENT.enqueue, "no.such", {}, unique="a").status, 404)
        self.assertEqual(self.problem(Client(URL, "pk_wrong").push_key).status, 401)

    def test_no_answer(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            began = time.monotonic()
            problem = self.problem(Client(f"http://127.0.0.1:{port}", KEY, timeout=0.5, attempts=1).push_key)
            self.assertLess(time.monotonic() - began, 2)
            self.assertEqual((problem.status, problem.detail), (0, f"http://127.0.0.1:{port}: timed out"))
        began = time.monotonic()
        problem = self.problem(Client(f"http://127.0.0.1:{port}", KEY, patience=2).push_key)
        self.assertLess(time.monotonic() - began, 3)
        self.assertEqual(problem.status, 0)
        self.assertIn("Connection refused", problem.detail)

    def test_a_repeated_notification_is_one(self):
        proxy = Proxy("drop", "busy 1", "pass")
        began = time.monotonic()
        accepted = Client(proxy.url, KEY).notify("x", user="nobody", idempotency_key=uuid.uuid4().hex)
        self.assertGreater(time.monotonic() - began, 1, "Retry-After is honoured")
        self.assertEqual((proxy.requests, proxy.ids), (3, [accepted["id"]] * 2))

    def test_what_is_not_repeated(self):
        proxy = Proxy("drop", "pass")
        problem = self.problem(Client(proxy.url, KEY).notify, "x", user="nobody")
        self.assertEqual((problem.status, proxy.requests), (0, 1))
        proxy = Proxy("busy 60", "pass")
        problem = self.problem(Client(proxy.url, KEY).logout, subscription())
        self.assertEqual((problem.status, problem.retry_after, proxy.requests), (503, 60, 1))

    def test_the_key_is_not_shown(self):
        shown = repr(CLIENT) + str(CLIENT) + repr(vars(CLIENT))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
        proxy = Proxy("drop")
        for url in (URL, closed, proxy.url):
            problem = self.problem(Client(url, KEY, attempts=1).notify, "x", tags="a and" if url == URL else "a")
            shown += "".join(traceback.TracebackException.from_exception(problem, capture_locals=True).format())
        for url, key in (("nonsense", KEY), (URL, f"{KEY}\n{KEY}")):
            error = self.problem(Client, url, key, wanted=ValueError)
            # The frames of this test have the key themselves.
            frames = error.__traceback__.tb_next
            shown += "".join(traceback.TracebackException(ValueError, error, frames, capture_locals=True).format())
        self.assertIn("in _send", shown)
        self.assertNotIn(KEY, shown)


if __name__ == "__main__":
    unittest.main()
