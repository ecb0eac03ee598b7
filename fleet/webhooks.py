"""What a server would send to a webhook, for predictions that no server has."""

import asyncio
import logging
import os
from typing import Any

import aiohttp

from fleet.bodies import Body

log = logging.getLogger("fleet")

TRIES, SECONDS = 3, 10.0


async def send_webhook(body: Body, answer: dict[str, Any]) -> None:
    """Post it as `completed`, if the prediction has a webhook that wants that. Never an error."""
    if not body.webhook or (body.webhook_events is not None and "completed" not in body.webhook_events):
        return
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    token = os.environ.get("WEBHOOK_AUTH_TOKEN")  # coglet's own variable
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for attempt in range(TRIES):
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(body.webhook, json=answer, headers=headers) as response,
            ):
                if response.status < 500:
                    return
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            log.warning("a webhook gives no answer (%s)", type(error).__name__)
        await asyncio.sleep(attempt)
