"""A client of Perennial's HTTP interface, for a backend: Python 3.9, and nothing but the standard library.

../README.md says what is repeated, and when. A client may be used by several threads.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import http.client
import json
import random
import re
import ssl
import time
from datetime import datetime, timezone
from typing import Any, Dict, List, Optional, Union
from urllib.parse import quote, urlencode, urlsplit

__all__ = ["Client", "Problem"]

Json = Dict[str, Any]
Time = Union[datetime, str]
_TRANSIENT = (0, 429, 502, 503, 504)
_ENDED = ("done", "cancelled", "expired")


class Problem(Exception):
    """A failed call: the problem document of the server (RFC 9457); the status is 0 when no answer came.

    `errors` has a `field` and what was `wanted` for each field that is not as wanted. `retry_after` is how long the
    server wants to be left alone, in seconds. `request_id` is the id of the request in the log of the server.
    """

    def __init__(self, status: int, title: str, detail: str = "", errors: Optional[List[Json]] = None, *,
                 retry_after: Optional[int] = None, type: str = "about:blank",
                 request_id: Optional[str] = None) -> None:
        self.status, self.title, self.detail, self.errors = status, title, detail, errors or []
        self.retry_after, self.type, self.request_id = retry_after, type, request_id
        wanted = "".join(f"; {error['field']}: wanted {error['wanted']}" for error in self.errors)
        super().__init__(f"{status} {title}: {detail}".rstrip(": ") + wanted)

    @property
    def fields(self) -> List[str]:
        """The names of the fields that are not as wanted."""
        return [error["field"] for error in self.errors]

    @property
    def is_transient(self) -> bool:
        """Whether a repetition may help. A 409 with Retry-After is a notification that is being accepted now."""
        return self.status in _TRANSIENT or (self.status == 409 and self.retry_after is not None)


class _Key:
    """An API key that no traceback with the values of variables shows."""

    def __init__(self, text: str) -> None:
        self._text = text

    def header(self) -> str:
        return f"Bearer {self._text}"

    def __repr__(self) -> str:
        return "<API key>"

    def __reduce__(self) -> str:
        raise TypeError("an API key cannot be pickled")


class Client:
    """A client of the server at `url`, such as https://push.example.com.

    `timeout` is the longest time of one request, `attempts` the largest number of requests of one call, and `patience`
    the longest time of one call with all its requests and the pauses between them; in seconds. How long looking up the
    name of the server may take is up to the system.
    """

    def __init__(self, url: str, key: str, *, timeout: float = 10, attempts: int = 4, patience: float = 30) -> None:
        # Nothing that is raised from here on has the key in a variable of this frame.
        is_key, self._key, key = re.fullmatch(r"\s*[!-~]+\s*", key) is not None, _Key(key.strip()), ""
        self._url = urlsplit(url.rstrip("/"))
        if not is_key:
            raise ValueError("an API key has printable characters only")
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ValueError(f"{url}: wanted a URL such as https://push.example.com")
        self._timeout, self._attempts, self._patience = timeout, attempts, patience
        self._tls = ssl.create_default_context() if self._url.scheme == "https" else None

    def __repr__(self) -> str:
        return f"Client({self._url.geturl()!r})"

    def notify(self, title: Optional[str] = None, body: Optional[str] = None, url: Optional[str] = None, *,
               options: Optional[Json] = None, payload: Any = None, all: bool = False, user: Optional[str] = None,
               users: Optional[List[str]] = None, tags: Optional[str] = None, subscriptions: Optional[List[int]] = None,
               push: Optional[List[Json]] = None, idempotency_key: Optional[str] = None, ttl: Optional[int] = None,
               urgency: Optional[str] = None, topic: Optional[str] = None, rate: Optional[float] = None,
               ramp_up: Optional[str] = None, at: Optional[Time] = None, expires: Optional[Time] = None,
               webhook: Optional[str] = None, log: Optional[str] = None, declarative: Optional[bool] = None,
               http: Optional[str] = None, template: Optional[bool] = None, dry_run: Optional[bool] = None) -> Json:
        """Sends a notification to one audience: `all`, `user`, `users`, `tags`, `subscriptions` or `push`.

        With an idempotency key, the same call within 24 hours sends nothing more and returns the same id. `options` are
        further options of showNotification (icon, actions); `payload` instead of a title is any value, for a service
        worker of your own; `tags` is an expression (news and fr and not muted); `push` are subscriptions that are not
        stored. `template=False` sends {{name}} as it is, as texts of visitors need it. Returns `id`, `state`,
        `audience` and perhaps `warnings`.
        """
        if idempotency_key is not None and not re.fullmatch(r"[ -~]{1,255}", idempotency_key):
            error = {"field": "Idempotency-Key", "wanted": "1 to 255 printable characters"}
            raise Problem(422, "Unprocessable Entity", "not as wanted: Idempotency-Key", [error])
        to = _given(all=all or None, user=user, users=users, tags=tags, subscriptions=subscriptions, push=push)
        notification = {**(options or {}), **_given(title=title, body=body, url=url)}
        request = _given(
            notification=notification or None, payload=payload, ttl=ttl, urgency=urgency, topic=topic, rate=rate,
            ramp_up=ramp_up, at=_time(at), expires=_time(expires), webhook=webhook, log=log, declarative=declarative,
            http=http, template=template, dry_run=dry_run)
        return self._call("POST", "/notify", {"to": to, **request}, idempotency_key is not None, idempotency_key)

    def notification(self, id: str) -> Json:
        """The state of a notification, and its outcomes so far."""
        return self._call("GET", _path("notifications", id))

    def notifications(self, *, cursor: Optional[str] = None, limit: Optional[int] = None) -> Json:
        """Notifications, the newest first: `notifications`, and `next`, the cursor of the next page."""
        return self._call("GET", "/notifications" + _query(cursor=cursor, limit=limit))

    def wait(self, id: str, seconds: float = 60) -> Json:
        """Waits until a notification has ended, or until so many seconds are over, and returns its state."""
        end, pause = time.monotonic() + seconds, 0.1
        while True:
            found = self.notification(id)
            left = end - time.monotonic()
            if left <= 0 or found["state"] in _ENDED:
                return found
            time.sleep(min(pause, left))
            pause = min(2, pause * 1.5)

    def pause(self, id: str) -> Json:
        return self._call("POST", _path("notifications", id, "pause"), repeatable=True)

    def resume(self, id: str) -> Json:
        return self._call("POST", _path("notifications", id, "resume"), repeatable=True)

    def cancel(self, id: str) -> Json:
        return self._call("POST", _path("notifications", id, "cancel"), repeatable=True)

    def set_rate(self, id: str, rate: Optional[float]) -> Json:
        """Changes the sends per second; None is as fast as push services take them."""
        return self._call("PATCH", _path("notifications", id), {"rate": rate}, True)

    def deliveries(self, id: str, outcome: Optional[str] = None) -> List[Json]:
        """The logged deliveries of a notification: failures, or all if it was sent with `log="all"`."""
        return self._call("GET", _path("notifications", id, "deliveries") + _query(outcome=outcome))

    def push_key(self) -> str:
        """The applicationServerKey that pages subscribe with."""
        return self._call("GET", "/push/key")["key"]

    def subscribe(self, subscription: Json, *, key: Optional[str] = None, user: Optional[str] = None,
                  tags: Optional[List[str]] = None, metadata: Optional[Json] = None,
                  replaces: Optional[Json] = None) -> int:
        """Stores a subscription in the form of a browser's `PushSubscription.toJSON()`, and returns its id.

        What is not given stays as it is stored. `key` is the applicationServerKey that the subscription was made with;
        `replaces` has `endpoint` and `auth` of the subscription that the browser had before.
        """
        request = _given(subscription=subscription, key=key, user=user, tags=tags, metadata=metadata, replaces=replaces)
        return self._call("POST", "/subscriptions", request, True)["id"]

    def logout(self, subscription: Json) -> int:
        """Takes its user, and the tags and metadata of that user, off a subscription, which stays."""
        return self._call("POST", "/subscriptions", {"subscription": subscription, "user": None}, True)["id"]

    def unsubscribe(self, which: Union[int, str]) -> bool:
        """Deletes a subscription by its id or its endpoint; False when there is none."""
        path = f"/subscriptions/{which}" if isinstance(which, int) else "/subscriptions"
        try:
            self._call("DELETE", path, None if isinstance(which, int) else {"endpoint": which}, True)
        except Problem as problem:
            if problem.status != 404:
                raise
            return False
        return True

    def subscription(self, id: int) -> Json:
        return self._call("GET", f"/subscriptions/{id}")

    def subscriptions(self, *, user: Optional[str] = None, tag: Optional[str] = None, endpoint: Optional[str] = None,
                      cursor: Optional[int] = None, limit: Optional[int] = None) -> Json:
        """Subscriptions in the order of their ids: `subscriptions`, and `next`, the cursor of the next page."""
        query = _query(user=user, tag=tag, endpoint=endpoint, cursor=cursor, limit=limit)
        return self._call("GET", "/subscriptions" + query)

    def user(self, user: str) -> Json:
        """Everything that is stored about a user."""
        return self._call("GET", _path("users", user))

    def delete_user(self, user: str) -> Json:
        """Deletes everything that is stored about a user, and returns the numbers of subscriptions and deliveries."""
        return self._call("DELETE", _path("users", user), None, True)

    @staticmethod
    def user_token(user: str, secret: str, site: str = "default", seconds: int = 3600) -> str:
        """Makes the token with which a page may name this user. The secret is that of `sites.SITE.user_secret_file`."""
        expires = int(time.time()) + seconds
        text = f"v1.{site}.{expires}.{user}"
        signature = hmac.new(secret.rstrip("\r\n").encode(), text.encode(), hashlib.sha256).digest()
        return f"v1.{expires}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"

    def enqueue(self, kind: str, payload: Any, *, delay: Optional[str] = None, unique: Optional[str] = None,
                priority: Optional[int] = None) -> str:
        """Enqueues a job of a public kind, and returns its id.

        This is the id of another job, while one of this kind with this unique key has not ended.
        """
        request = {"payload": payload, **_given(delay=delay, unique=unique, priority=priority)}
        return self._call("POST", _path("jobs", kind), request)["id"]

    def _call(self, method: str, path: str, body: Optional[Json] = None, repeatable: bool = False,
              idempotency_key: Optional[str] = None) -> Any:
        """Sends a request, and repeats it within the attempts and the patience if that is safe and may help."""
        repeatable = repeatable or method == "GET"
        end, attempt = time.monotonic() + self._patience, 1
        while True:
            try:
                return self._send(method, path, body, idempotency_key, end)
            except Problem as problem:
                pause = (problem.retry_after or 0) + min(8, 2 ** (attempt - 3)) * random.uniform(0.5, 1)
                may_help = repeatable and problem.is_transient and attempt < self._attempts
                if not may_help or time.monotonic() + pause >= end:
                    raise
            time.sleep(pause)
            attempt += 1

    def _send(self, method: str, path: str, body: Optional[Json], idempotency_key: Optional[str], end: float) -> Any:
        failure = ""
        try:
            status, headers, data = self._exchange(method, self._url.path + path, body, idempotency_key, end)
        except (OSError, http.client.HTTPException) as error:
            failure = str(error) or type(error).__name__
        if failure:
            # This is outside of the `except`: the frames of the connection have the key in their variables.
            raise Problem(0, "No Answer", f"{self._url.geturl()}: {failure}")
        media_type = headers.get("content-type", "")
        try:
            if media_type.startswith("application/x-ndjson"):
                answer: Any = [json.loads(line) for line in data.splitlines()]
            else:
                answer = json.loads(data) if data else {}
        except ValueError:
            answer = None
        if status < 300 and answer is not None:
            return answer
        # A problem without a type is about:blank (RFC 9457, section 4.2.1), and a proxy answers in its own way.
        if not (media_type.startswith("application/problem+json") and isinstance(answer, dict)):
            answer = {}
        raise Problem(status, answer.get("title", "Unexpected Answer"), answer.get("detail", ""), answer.get("errors"),
                      retry_after=_seconds(headers.get("retry-after")), type=answer.get("type", "about:blank"),
                      request_id=headers.get("x-request-id"))

    def _exchange(self, method: str, path: str, body: Optional[Json], idempotency_key: Optional[str],
                  end: float) -> Any:
        """One request on a connection of its own, which no other thread or process shares; no redirect is followed."""
        data = b"" if body is None else json.dumps(body).encode()
        end = min(end, time.monotonic() + self._timeout)
        host, port, timeout = self._url.hostname or "", self._url.port, max(0.001, end - time.monotonic())
        connection = (http.client.HTTPSConnection(host, port, timeout=timeout, context=self._tls) if self._tls
                      else http.client.HTTPConnection(host, port, timeout=timeout))
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            connection.putheader("Authorization", self._key.header())
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(len(data)))
            connection.putheader("Connection", "close")
            if idempotency_key is not None:
                connection.putheader("Idempotency-Key", idempotency_key)
            connection.endheaders(data)
            response, received = connection.getresponse(), bytearray()
            while part := response.read1(65536):
                received += part
                if time.monotonic() > end:
                    raise TimeoutError("timed out")
            if response.length:
                raise http.client.IncompleteRead(bytes(received), response.length)
            return response.status, response.headers, bytes(received)
        finally:
            connection.close()


def _given(**values: Any) -> Json:
    return {name: value for name, value in values.items() if value is not None}


def _path(*parts: str) -> str:
    return "/" + "/".join(quote(part, safe="") for part in parts)


def _query(**values: Any) -> str:
    return "?" + urlencode(_given(**values))


def _time(value: Optional[Time]) -> Optional[str]:
    """A time without a zone is one of the local zone, as everywhere in Python."""
    return value.astimezone(timezone.utc).isoformat() if isinstance(value, datetime) else value


def _seconds(retry_after: Optional[str]) -> Optional[int]:
    """Seconds, or the seconds until a date (RFC 9110, section 10.2.3)."""
    try:
        if retry_after is None or retry_after.isdigit():
            return None if retry_after is None else int(retry_after)
        return max(0, round(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()))
    except (TypeError, ValueError):
        return None
