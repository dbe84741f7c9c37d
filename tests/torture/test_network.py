"""Two hosts, as network namespaces joined by a cable that is pulled and put back."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.trainer import tiny

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Names of two namespaces, or a skip with the reason."""
    mark = uuid.uuid4().hex[:6]
    names = [f"ijepa-{mark}-{n}" for n in range(2)]
    cables = [f"ij{mark}{n}" for n in range(2)]
    made = []
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
                made.append(name)
            _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
            for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
                _ip("link", "set", cable, "netns", name)
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
                _ip("-n", name, "link", "set", cable, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            text = getattr(error, "stderr", b"") or str(error)
            pytest.skip(f"network namespaces cannot be made here: {text!r}")
        yield names, cables
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _agent(host, cable, argv, output):
    """torchrun on one host."""
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    first = cable.endswith("0")
    command += [f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=job"]
    # torchrun tells by the host's name which of them keeps the store; here both have one name
    command += [f"--rdzv-conf=is_host={str(first).lower()}"]
    command += ["--local-addr", ADDRESSES[not first], "-m", "ijepa_fast.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": cable}
    with output.open("a") as file:
        return subprocess.Popen(
            [*command, *argv], cwd=ROOT, env=environment, stdout=file, stderr=file
        )


def _workers():
    found = subprocess.run(
        ["pgrep", "-f", "ijepa_fast.train --config"], check=False, capture_output=True, text=True
    )
    return found.stdout.split()


def test_a_cable_that_is_pulled_and_put_back(hosts, tmp_path):
    names, cables = hosts
    data = tiny.write_images(tmp_path / "data")
    out, output = tmp_path / "run", [tmp_path / f"host{n}.txt" for n in range(2)]
    settings = {"batch__device": 4, "optim__epochs": 40, "rank_timeout": 10, "log__interval": 5}
    settings["checkpoint__keep_every"] = 2
    argv = tiny.arguments(data, out, **settings)

    def start():
        return [_agent(n, c, argv, o) for n, c, o in zip(names, cables, output, strict=True)]

    agents = start()
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not (out / "checkpoints" / "step-00000010").exists():
            assert all(agent.poll() is None for agent in agents), output[0].read_text()
            time.sleep(0.05)
        _ip("-n", names[1], "link", "set", cables[1], "down")
        pulled = time.monotonic()
        marks = "has given no sign of life|has not answered"
        while time.monotonic() - pulled < 60:
            texts = [o.read_text() for o in output]
            if all(any(m in text for m in marks.split("|")) for text in texts):
                break
            if all(agent.poll() is not None for agent in agents):
                break
            time.sleep(0.2)
        left = time.monotonic() - pulled
        assert left < 60, [text[-3000:] for text in texts]
        time.sleep(5)
        _ip("-n", names[1], "link", "set", cables[1], "up")
        # the job as a scheduler would start it again, should its agents have given up
        deadline, again = time.monotonic() + 180, 0
        while time.monotonic() < deadline:
            codes = [agent.poll() for agent in agents]
            if codes == [0, 0]:
                break
            if all(code is not None for code in codes):
                agents, again = start(), again + 1
            elif any(code is not None for code in codes) and not _workers():
                # one agent has given up, the other waits for it: both anew
                for agent in agents:
                    agent.terminate()
                    agent.wait(60)
            time.sleep(0.5)
        assert [agent.poll() for agent in agents] == [0, 0], [o.read_text()[-3000:] for o in output]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.kill()
        for worker in _workers():
            os.kill(int(worker), 9)
    text = output[0].read_text() + output[1].read_text()
    assert "resumed from the checkpoint at step" in text
    codes, printed = tiny.run_ranks(data, tmp_path / "whole", **settings)
    assert codes == [0, 0], printed
    tiny.assert_same_state(out, tmp_path / "whole")
    print(
        f"TORTURE network: ranks left {left:.0f} s after the cable was pulled, "
        f"agents started again {again} times, same result"
    )
