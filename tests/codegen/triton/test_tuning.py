"""The fastest configuration is found within the budget, and found again without measuring."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slim.codegen.triton import modules, tuning
from slim.codegen.triton.kernel import Config
from slim.codegen.triton.tuning import Tuner
from tests.codegen.triton import small

pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("empty_cache")


class Device:
    """Launches nothing, and has a time for each block size; a block without one does not run."""

    def __init__(self, times: dict[int, float], error: Exception | None = None) -> None:
        self.times = times
        self.error = error or RuntimeError("PassManager::run failed")
        self.measured: list[int] = []
        self._launched = 0

    def run(self, config: Config) -> None:
        self._launched = config["BLOCK"]

    def measure(self, run: Callable[[], None]) -> float:
        run()
        self.measured.append(self._launched)
        if self._launched not in self.times:
            raise self.error
        return self.times[self._launched]

    def choose(self, size: int = 1000, seconds: float = 60, name: str = "fast", changed: str = "out = x + y") -> int:
        """The block that a new Tuner chooses."""
        tuner = Tuner(seconds, name, self.measure)
        return tuner.choose(modules.load(small.add(title=[changed])), (size,), self.run)["BLOCK"]


@pytest.fixture
def records(empty_cache: Path) -> Callable[[], list[Path]]:
    return lambda: sorted((empty_cache / "triton" / "tuned").glob("*.json"))


def test_the_fastest_is_chosen() -> None:
    device = Device({256: 3.0, 512: 1.0, 1024: 2.0})
    assert device.choose() == 512
    assert device.measured == [256, 512, 1024]


def test_a_choice_is_found_again_without_measuring() -> None:
    Device({256: 3.0, 512: 1.0, 1024: 2.0}).choose()
    later = Device({})
    assert later.choose() == 512
    assert later.choose(seconds=0) == 512
    assert later.measured == []


@pytest.mark.parametrize("other", [dict(size=1025), dict(name="slow"), dict(changed="another text")])
def test_other_sizes_devices_and_sources_are_measured_apart(other: dict) -> None:
    Device({256: 3.0, 512: 1.0, 1024: 2.0}).choose(size=1000)
    assert Device({256: 1.0, 512: 2.0, 1024: 3.0}).choose(**other) == 256


def test_another_triton_measures_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    Device({256: 3.0, 512: 1.0, 1024: 2.0}).choose()
    monkeypatch.setattr("triton.__version__", "99")
    assert Device({256: 1.0, 512: 2.0, 1024: 3.0}).choose() == 256


def test_sizes_up_to_the_same_power_of_two_share_a_choice() -> None:
    Device({256: 3.0, 512: 1.0, 1024: 2.0}).choose(size=600)
    later = Device({})
    assert later.choose(size=1024) == 512
    assert later.measured == []
    assert [tuning._bucket(n) for n in (0, 1, 2, 3, 1024, 1025)] == [0, 1, 2, 4, 1024, 2048]


def test_what_does_not_run_is_passed_over_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    from triton.runtime.errors import OutOfResources

    device = Device({256: 3.0, 512: 2.0}, OutOfResources(300_000, 227_000, "shared memory"))
    with caplog.at_level(logging.INFO):
        assert device.choose() == 512
    assert "does not run on fast: out of resource: shared memory" in caplog.text
    assert Device({}).choose() == 512


def test_a_default_that_does_not_run_is_not_chosen() -> None:
    assert Device({512: 2.0, 1024: 1.0}).choose() == 1024


def test_a_broken_device_is_no_reason_to_try_another() -> None:
    with pytest.raises(torch.AcceleratorError):
        Device({}, torch.AcceleratorError("an illegal memory access")).choose()


def test_an_error_of_the_caller_is_not_swallowed() -> None:
    with pytest.raises(KeyError):
        Device({}, KeyError("n")).choose()


def test_where_nothing_runs_the_default_is_left_and_nothing_kept(records: Callable[[], list[Path]]) -> None:
    assert Device({}).choose() == 256
    assert records() == []


def test_the_log_says_the_gain_over_the_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Device({256: 3.0, 512: 1.0, 1024: 2.0}).choose()
    assert "1.0000 ms, 3.00 times the default's speed (3 of 3 measured)" in caplog.text


# -- the budget --------------------------------------------------------------------------------------------------------


def test_without_a_budget_the_default_is_chosen_and_nothing_kept(records: Callable[[], list[Path]]) -> None:
    device = Device({256: 3.0, 512: 1.0, 1024: 2.0})
    assert device.choose(seconds=0) == 256
    assert device.measured == []
    assert records() == []


def test_a_spent_budget_is_gone_on_with_later(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(100))
    monkeypatch.setattr("slim.codegen.triton.tuning.time.perf_counter", lambda: next(seconds))  # a second each
    first = Device({256: 3.0, 512: 2.0, 1024: 1.0})
    assert first.choose(seconds=2) == 512
    assert first.measured == [256, 512]
    second = Device(first.times)
    assert second.choose(seconds=2) == 1024
    assert second.measured == [1024]


def test_one_budget_serves_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(100))
    monkeypatch.setattr("slim.codegen.triton.tuning.time.perf_counter", lambda: next(seconds))
    device = Device({256: 3.0, 512: 2.0, 1024: 1.0})
    tuner = Tuner(3, "fast", device.measure)
    chosen = [tuner.choose(modules.load(small.add()), (size,), device.run)["BLOCK"] for size in (100, 200)]
    assert chosen == [1024, 256]


def test_a_single_configuration_is_not_measured() -> None:
    device = Device({256: 1.0})
    module = modules.load(small.add(configs=[dict(BLOCK=256)]))
    assert Tuner(60, "fast", device.measure).choose(module, (1000,), device.run) == {"BLOCK": 256}
    assert device.measured == []


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "\xff", "[1]", "{}", '{"milliseconds": 3}', '{"milliseconds": []}', '{"milliseconds": ["1"]}',
        '{"milliseconds": [NaN]}', '{"milliseconds": [-1]}', '{"milliseconds": [1, 2, 3, 4]}',
    ],
)  # fmt: skip
def test_a_damaged_record_is_measured_anew(
    text: str, records: Callable[[], list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    Device({256: 3.0, 512: 1.0, 1024: 2.0}).choose()
    (path,) = records()
    whole = path.read_bytes()
    path.write_bytes(text.encode("latin1"))
    with caplog.at_level(logging.WARNING):
        assert Device({256: 3.0, 512: 1.0, 1024: 2.0}).choose() == 512
    assert str(path) in caplog.text
    assert path.read_bytes() == whole


@pytest.mark.gpu
def test_a_kernel_is_timed_on_the_gpu() -> None:
    x = torch.zeros(1 << 24, device="cuda")
    module = modules.load(small.add())
    config = module.configs[0]
    short = tuning.milliseconds(lambda: module.launch([x, x, x], [1 << 20], config))
    assert 0 < short < tuning.milliseconds(lambda: module.launch([x, x, x], [1 << 24], config))
