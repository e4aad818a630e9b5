"""One server process for all tests of a module, of the model that is shipped."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

for needed in ("transformers", "fastapi", "uvicorn", "prometheus_client", "openai"):
    pytest.importorskip(needed)

KEY = "the-key-of-the-tests"
TEMPLATE = """{% for message in messages %}{% if message.role == 'user' and 'refuse' in message.content %}\
{{ raise_exception('it says refuse') }}{% endif %}{{ message.content }}{% endfor %}"""
RUNNING, WAITING, BODY = 4, 8, 64 * 1024


class Server:
    """A `moerunner serve` of its own process, ready for requests."""

    def __init__(self, path, *options, key=None):
        env = {name: value for name, value in os.environ.items() if name != "MOERUNNER_API_KEY"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moerunner", "serve", str(path), "--port", "0", "--json", *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env | ({"MOERUNNER_API_KEY": key} if key else {}),
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in background jobs
        )
        self.key = key
        lines = []
        for line in self.process.stdout:  # one object, on several lines
            lines.append(line)
            if line == "}\n":
                break
        else:
            raise AssertionError(self.process.communicate()[1])
        self.facts = json.loads("".join(lines))
        self.url = self.facts["url"].removesuffix("/v1")
        self.port = int(self.url.rpartition(":")[2])

    def ask(self, path, body=None, *, raw=None, headers=None, timeout=60):
        """The status, and the JSON or the text that came."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url + path, data, sent | (headers or {}))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as refusal:
            status, text = refusal.code, refusal.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def metric(self, name, **labels):
        """The sum of a metric over all series that have these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        lines = [line for line in self.ask("/metrics")[1].splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in wanted))

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.ended()

    def ended(self):
        """The exit status and what it wrote. Python alone takes two seconds of a processor to end, many on a busy machine."""
        out, err = self.process.communicate(timeout=150)
        return self.process.returncode, out, err


def shipped():
    from moerunner.cli import demo

    try:
        return demo.shipped_model()
    except demo.CheckpointError:
        pytest.skip("the shipped model is not built")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    template = Path(tmp_path_factory.mktemp("serve")) / "chat.jinja"
    template.write_text(TEMPLATE)
    limits = ("--max-running", RUNNING, "--max-waiting", WAITING, "--max-body", BODY, "--max-new-tokens", 450)
    running = Server(shipped(), "--dtype", "float32", "--chat-template", template, *limits, key=KEY)
    yield running
    if running.process.poll() is None:
        code, out, err = running.stop()
        assert (code, out) == (0, "")
        assert "Traceback" not in err, err
