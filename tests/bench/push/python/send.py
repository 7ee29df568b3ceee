"""A web push sender on pywebpush, as its users write it: it knows HTTP/1.1 only, so connections are kept alive.

On aiohttp, which takes half the time of requests; threads make requests slower.
"""

import argparse
import asyncio
import json
import ssl
import sys
import time

import aiohttp
from py_vapid import Vapid
from pywebpush import webpush_async

CONCURRENCY = 64


async def main():
    parser = argparse.ArgumentParser()
    for name in ("url", "ca", "p256dh", "auth"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--count", type=int, required=True)
    options = parser.parse_args()
    keys = {"p256dh": options.p256dh, "auth": options.auth}
    text = "x" * 200

    began, used = time.perf_counter(), time.process_time()
    vapid = Vapid()
    vapid.generate_keys()
    numbers = iter(range(options.count))
    sent = failed = 0

    async def worker(session):
        nonlocal sent, failed
        for number in numbers:
            try:
                answer = await webpush_async(
                    {"endpoint": f"{options.url}{number:0>180}", "keys": keys},
                    text,
                    vapid_private_key=vapid,
                    vapid_claims={"sub": "mailto:bench@example.org"},
                    ttl=60,
                    aiohttp_session=session,
                )
                sent += answer.status == 201
            except Exception as error:
                failed += 1
                if failed == 1:
                    print(f"first failure: {error!r}", file=sys.stderr)

    tls = ssl.create_default_context(cafile=options.ca)
    connector = aiohttp.TCPConnector(limit=CONCURRENCY, ssl=tls)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(worker(session) for _ in range(CONCURRENCY)))
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - used
    print(json.dumps({"sent": sent, "seconds": seconds, "cpu_seconds": cpu_seconds}))


asyncio.run(main())
