"""The guide to webhooks: its task delivers to a server that is down at first."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from leveret.client import load_app
from leveret.testing import under_test
from tests.support.handbook import DOCS, blocks

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

SECRET = "quiet"


class Receiver(BaseHTTPRequestHandler):
    """Answers the first request with 503."""

    came: list[tuple[dict[str, str], bytes]]

    def do_POST(self) -> None:
        self.came.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(503 if len(self.came) == 1 else 204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
        """Quietly."""


def test_the_guide_to_webhooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = [block for block in blocks(DOCS / "guides/webhooks.md") if block.title == "webhooks.py"]
    (tmp_path / "webhooks.py").write_text(program.text)
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)
    app = load_app(f"{tmp_path / 'webhooks.py'}:app")
    (deliver,) = app.tasks
    came: list[tuple[dict[str, str], bytes]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Receiver,), {"came": came}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with under_test(app) as test:
            url = f"http://127.0.0.1:{server.server_address[1]}/hook"
            handle = deliver.options(headers={"tenant": "acme"}).enqueue_sync(url, {"order": 18})
            test.drain_sync(expect=Exception)
            test.clock.advance(3600)
            test.drain_sync()
            test.expecting(headers={"tenant": "acme"}, count=1).assert_enqueued(deliver, url, {"order": 18})
    finally:
        server.shutdown()
        server.server_close()
    assert len(came) == 2
    for headers, body in came:
        assert json.loads(body) == {"order": 18}
        assert headers["Webhook-Id"] == handle.id
        assert headers["Webhook-Signature"] == hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
