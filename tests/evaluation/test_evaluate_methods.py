"""Probes and fine-tuning from the command line: as made by hand, and as scikit-learn has it."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ijepa_fast import evaluation
from ijepa_fast.evaluation.features import LAST, LAST_FOUR, PIXELS, SMALL, Features, extract
from ijepa_fast.evaluation.labelled import labelled_data
from ijepa_fast.evaluation.linear import linear_probe
from ijepa_fast.evaluation.ridge import ridge_accuracy
from ijepa_fast.evaluation.scores import _for_regression, score_knn
from ijepa_fast.evaluation.subsets import low_shot_rows
from ijepa_fast.weights import export, read_weights
from ijepa_fast.weights.encoder import load_encoder
from tests.trainer import tiny

CPU = torch.device("cpu")
SUBJECTS = ["raw pixels", "untrained network", "target encoder, step 6"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sub-folders train (80 images) and test (24), four colours."""
    root = tmp_path_factory.mktemp("split")
    tiny.write_images(root / "train", count=80, classes=4)
    tiny.write_images(root / "test", count=24, classes=4)
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert tiny.run(data / "train", out, max_steps=6, model__depth=5) == 0
    return out


@pytest.fixture(scope="module")
def parts(run, data):
    """Features of the target encoder and pixels, and the read weights."""
    weights = read_weights(run)
    assert weights.config
    splits = labelled_data(str(data), weights.config.data, CPU)
    encoders = {"target": load_encoder(weights)}
    return [
        extract(encoders, split, training_images=80, precision="float32", four=True)
        for split in splits
    ]


def _json(capsys, *argv):
    assert evaluation.main([*(str(a) for a in argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_features_belong_to_their_labels_and_layers(run, data, parts):
    encoder = load_encoder(run)
    train, test = parts
    assert train.sets["target"][LAST].shape == (80, 32)
    assert test.sets["target"][LAST_FOUR].shape == (24, 4 * 32)
    # one image at a time, by another way
    config = read_weights(run).config
    assert config
    split = labelled_data(str(data), config.data, CPU)[1]
    images, labels, _ = split.load()
    assert torch.equal(labels, test.labels)
    for row in (0, 11, 23):
        x = encoder.normalise(images[row : row + 1])
        outputs, hidden = [], encoder.network.embed(x)
        for block in encoder.network.blocks:
            hidden = block(hidden)
            outputs.append(encoder.network.norm(hidden).mean(dim=1)[0])
        torch.testing.assert_close(test.sets["target"][LAST_FOUR][row], torch.cat(outputs[1:]))
        torch.testing.assert_close(test.sets["target"][LAST][row], outputs[4])
        assert torch.equal(
            test.sets[PIXELS][LAST][row].view(3, 32, 32), images[row].permute(2, 0, 1).float()
        )


def test_every_method_from_the_command_line(run, data, parts, capsys, tmp_path):
    out = tmp_path / "result.json"
    methods = ("knn", "ridge", "linear")
    few = ("--k", "5", "--linear-epochs", "60")
    result = _json(capsys, run, "--data", data, "--methods", *methods, *few, "--out", out)
    assert json.loads(out.read_text()) == result
    accuracy = result["accuracy"]
    assert list(accuracy) == SUBJECTS
    train, test = parts
    trained, pixels = accuracy[SUBJECTS[2]], accuracy["raw pixels"]
    assert set(pixels) == {"kNN", "kNN, not centred", "ridge", "linear", "linear+BN"}
    deeper = {"ridge, last 4", "linear, last 4", "linear+BN, last 4"}
    assert set(trained) == set(pixels) | deeper
    # as computed from the features that are tested above
    knn = score_knn(train, test, k=5)
    assert {k: trained[k] for k in knn["target"]} == knn["target"]
    ridge = {
        key: ridge_accuracy(
            train.sets["target"][key], train.labels, test.sets["target"][key], test.labels
        ).accuracy
        for key in (LAST, LAST_FOUR)
    }
    assert (trained["ridge"], trained["ridge, last 4"]) == (ridge[LAST], ridge[LAST_FOUR])
    linear = linear_probe(
        train.sets["target"], train.labels, test.sets["target"], test.labels, epochs=60
    )
    assert trained["linear"] == linear.best_of(LAST, False).accuracy
    assert trained["linear+BN, last 4"] == linear.best_of(LAST_FOUR, True).accuracy
    heads = result["linear"][SUBJECTS[2]]["heads"]
    assert len(heads) == 2 * 2 * 7
    assert all(0 <= head["accuracy"] <= 1 for head in heads)
    # colours: pixels tell them apart, and scikit-learn's converged probe of the same features does
    assert pixels["linear"] == pixels["ridge"] == 1.0
    theirs = LogisticRegression(max_iter=2000).fit(train.sets[PIXELS][LAST], train.labels)
    assert theirs.score(test.sets[PIXELS][LAST], test.labels) == 1.0


def test_regressions_get_one_channel_of_grey_pixels(parts):
    train, test = parts
    assert _for_regression(train, test, PIXELS)[0][LAST].shape[1] == 3 * 32 * 32
    grey = [
        Features(sets={PIXELS: {SMALL: part.sets[PIXELS][SMALL][:, :1024].tile(3)}}, labels=y)
        for part, y in ((train, train.labels), (test, test.labels))
    ]
    for part, given in zip(parts, _for_regression(grey[0], grey[1], PIXELS), strict=True):
        assert torch.equal(given[LAST], part.sets[PIXELS][SMALL][:, :1024])


def test_the_table(run, data, capsys):
    assert evaluation.main([str(run), "--data", str(data), "--methods", "knn", "ridge"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["kNN", "ridge"]
    assert printed[1].split() == ["kNN", "not", "centred", "ridge", "last", "4"]
    assert printed[2].split() == ["raw", "pixels", *["100.0", "%"] * 3, "-"]
    assert [line.split("  ")[0] for line in printed[2:5]] == SUBJECTS
    assert len({len(line) for line in printed[1:5]}) == 1


def test_low_shot_uses_the_fixed_subset_for_all(run, data, capsys):
    tune = ("--finetune.per-class", "2", "--finetune.epochs", "3", "--finetune.batch", "4")
    argv = (run, "--data", data, "--methods", "finetune", *tune)
    result = _json(capsys, *argv)
    details = result["finetune"]
    assert (details["images"], details["per_class"], details["share"]) == (8, 2, None)
    for subject in SUBJECTS[1:]:
        assert details[subject]["steps"] == 6
        assert len(details[subject]["losses"]) == 3
    title = "fine-tuned, 2 a class"
    assert [list(scores) for scores in result["accuracy"].values()] == [[title]] * 3
    again = _json(capsys, *argv)
    assert again == result
    config = read_weights(run).config
    assert config
    split = labelled_data(str(data), config.data, CPU)[0]
    rows = low_shot_rows(split.labels, per_class=2)
    assert np.bincount(split.labels[rows]).tolist() == [2, 2, 2, 2]


def test_full_fine_tuning_learns_colours(run, data, capsys):
    tune = ("--finetune.share", "1", "--finetune.epochs", "12", "--finetune.batch", "16")
    result = _json(capsys, run, "--data", data, "--methods", "finetune", *tune)
    assert result["finetune"]["images"] == 80
    losses = result["finetune"][SUBJECTS[2]]["losses"]
    assert losses[-1] < losses[0]
    assert result["accuracy"][SUBJECTS[2]]["fine-tuned, 100 %"] > 0.8


def test_exported_weights_score_as_the_run(run, data, tmp_path, capsys):
    """The untrained network is another one: a file has no seed."""
    expected = _json(capsys, run, "--data", data, "--methods", "knn", "ridge")
    export.export(read_weights(run), tmp_path / "hf", format="hf")
    result = _json(capsys, tmp_path / "hf", "--data", data, "--methods", "knn", "ridge")
    assert result["accuracy"]["target encoder"] == expected["accuracy"][SUBJECTS[2]]
    assert result["accuracy"]["raw pixels"] == expected["accuracy"]["raw pixels"]
    assert result["step"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--methods", "finetune", "--finetune.share", "0"), "finetune.share must be above 0"),
        (("--methods", "finetune", "--finetune.epochs", "0"), "finetune.epochs must be at least 1"),
        (("--methods", "finetune", "--finetune.per-class", "0"), "finetune.per_class must be"),
        (("--methods", "finetune", "--finetune.lr", "-1"), "lr must be"),
        (("--methods",), "methods must name at least one"),
        (("--heads", "3"), ""),
        (("--out", "/nowhere/x.json"), "out must lie in a folder that exists"),
    ],
)
def test_wrong_settings(run, data, capsys, flags, message):
    code = evaluation.main([str(run), "--data", str(data), *flags])
    error = capsys.readouterr().err
    if not message:
        # a run tells its heads itself
        assert code == 0
        return
    assert code == 2
    assert message in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("error: ")


def test_results_are_not_overwritten(run, data, tmp_path, capsys):
    (tmp_path / "r.json").write_text("mine")
    argv = [str(run), "--data", str(data), "--out", str(tmp_path / "r.json")]
    assert evaluation.main(argv) == 2
    assert "out must be a new file" in capsys.readouterr().err
    assert (tmp_path / "r.json").read_text() == "mine"
