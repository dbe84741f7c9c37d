"""MLflow: one run, which a resume goes on with."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from ijepa_fast.atomic import atomic_write
from ijepa_fast.callbacks.callback import Callback, RunInfo, Status
from ijepa_fast.callbacks.scalars import scalars
from ijepa_fast.config import flatten

__all__ = ["MLflow"]

_logger = logging.getLogger(__name__)
_STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# a server's limits: parameters of one request, characters of a value
_PARAMETERS, _CHARACTERS = 100, 500


class MLflow(Callback):
    """Logs every row's numbers, and all settings as parameters of the run's first start.

    MLFLOW_TRACKING_URI names a server; without it OUT/mlruns is a file store. The experiment is
    MLFLOW_EXPERIMENT_NAME or `ijepa-fast`. OUT/mlflow_run_id holds the run's id.
    """

    _sent: Any = None

    def on_start(self, info: RunInfo) -> None:
        """Begins a run, or goes on with the one that this folder's checkpoint belongs to."""
        import mlflow
        from mlflow import environment_variables as environment
        from mlflow.entities import Metric, Param

        self._metric = Metric
        given = mlflow.is_tracking_uri_set()
        if not given and hasattr(environment, "MLFLOW_ALLOW_FILE_STORE"):
            # MLflow 3.17 refuses file stores where nobody asks for one
            environment.MLFLOW_ALLOW_FILE_STORE.set(True)
        store = None if given else (info.out / "mlruns").resolve().as_uri()
        self._client = client = mlflow.MlflowClient(store)
        kept = info.out / "mlflow_run_id"
        if info.step > 0 and kept.exists():
            self._id = kept.read_text()
            client.update_run(self._id, status="RUNNING")
        else:
            name = environment.MLFLOW_EXPERIMENT_NAME.get() or "ijepa-fast"
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name)
            self._id = client.create_run(experiment, run_name=info.out.resolve().name).info.run_id
            with atomic_write(kept) as temporary:
                temporary.write_text(self._id)
            flat = flatten(info.settings)
            parameters = [Param(key, str(value)[:_CHARACTERS]) for key, value in flat.items()]
            for first in range(0, len(parameters), _PARAMETERS):
                client.log_batch(self._id, params=parameters[first : first + _PARAMETERS])
        _logger.info("MLflow: run %s in %s", self._id, client.tracking_uri)

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Logs the row in a thread of MLflow's; the one before has arrived, or raises here."""
        self._wait()
        now, step = int(1e3 * time.time()), row["step"]
        metrics = [self._metric(key, value, now, step) for key, value in scalars(row).items()]
        self._sent = self._client.log_batch(self._id, metrics=metrics, synchronous=False)

    def on_evaluation(self, row: Mapping[str, Any]) -> None:
        """Logs the row and waits for it: a resume does not evaluate again."""
        self.on_step(row)
        self._wait()

    def _wait(self) -> None:
        if self._sent:
            self._sent.wait()

    def on_end(self, status: Status, step: int) -> None:
        """Sets the run's status."""
        self._wait()
        self._client.set_terminated(self._id, _STATUS[status])
