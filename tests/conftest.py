"""One thread for every test process: networks this small only lose by more. A cache of its own."""

import os
import shutil
import signal
import tempfile

# before torch starts its threads, and for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
# nohup and a shell's background have them ignored, by the processes that tests start too
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--torture", action="store_true", help="the long campaigns, too")
    long = parser.getgroup("torture", "how long the campaigns of --torture are")
    long.addoption("--mutations", type=int, default=10_000, help="files a campaign damages")
    long.addoption("--kills", type=int, default=1_000, help="kill -9, in all")
    long.addoption("--soak-minutes", type=float, default=180, help="one run, watched for growth")


def pytest_ignore_collect(collection_path, config):
    """`make torture` runs them, `make test` does not."""
    if "torture" in collection_path.parts and not config.getoption("--torture"):
        return True
    return None


def pytest_configure(config):
    """Tables of the tests' data do not go into the user's cache; workers share the first one's."""
    if not hasattr(config, "workerinput"):
        config.own_cache = tempfile.mkdtemp(prefix="ijepa-fast-tests-")
        os.environ["XDG_CACHE_HOME"] = config.own_cache


def pytest_unconfigure(config):
    if hasattr(config, "own_cache"):
        shutil.rmtree(config.own_cache, ignore_errors=True)
