"""The engine of one process, the learning rate, and the processes' helpers."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from unified_rl.engine import build_engine, distributed
from unified_rl.engine.local import LocalEngine
from unified_rl.engine.optimizer import lr_at, trained_parameters
from unified_rl.errors import RecipeError
from unified_rl.recipe.schema import EngineBlock, Optimizer
from unified_rl.run_folder.checkpoint import CheckpointError


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def gradients(module):
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def train_step(engine, x):
    with engine.window():
        engine.backward(engine.module(x).pow(2).mean())
    return engine.step()


class TestLearningRate:
    def test_warm_up_reaches_lr_with_its_last_step(self):
        block = Optimizer(lr=1.0, warmup_steps=4)
        assert [lr_at(step, 10, block) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]

    def test_linear_decay_would_reach_zero_after_the_last_step(self):
        block = Optimizer(lr=1.0, warmup_steps=2, decay="linear")
        assert [lr_at(step, 6, block) for step in range(2, 7)] == [1.0, 0.75, 0.5, 0.25, 0.0]

    def test_cosine_decay(self):
        block = Optimizer(lr=2.0, decay="cosine")
        assert lr_at(0, 8, block) == 2.0
        assert lr_at(4, 8, block) == pytest.approx(1.0)
        assert lr_at(2, 8, block) == pytest.approx(1.0 + math.sqrt(0.5))
        assert lr_at(8, 8, block) == pytest.approx(0.0)

    @pytest.mark.parametrize("decay", ["linear", "cosine"])
    def test_never_negative_and_safe_with_a_warm_up_as_long_as_the_run(self, decay):
        block = Optimizer(lr=1.0, warmup_steps=3, decay=decay)
        assert lr_at(20, 6, block) == 0.0
        assert lr_at(2, 3, block) == 1.0


class TestLocalEngine:
    def test_gradients_of_windows_are_summed(self):
        x = torch.randn(6, 4)
        whole, split = net(), net()
        LocalEngine(whole, Optimizer(), num_steps=1).backward(whole(x).sum())
        engine = LocalEngine(split, Optimizer(), num_steps=1)
        for part in x.split(2):
            with engine.window():
                engine.backward(split(part).sum())
        assert torch.allclose(gradients(whole), gradients(split), rtol=1e-5, atol=1e-6)

    def test_first_step_by_hand(self):
        # AdamW's first step moves every weight by lr * g / (|g| + eps) after decaying it by lr * weight_decay.
        module = nn.Linear(2, 1, bias=False)
        nn.init.ones_(module.weight)
        engine = LocalEngine(module, Optimizer(lr=0.5, eps=1.0, weight_decay=0.1, max_grad_norm=1.0), num_steps=9)
        engine.backward((module.weight * torch.tensor([[3.0, 4.0]])).sum())
        assert engine.step() == pytest.approx(5.0)
        clipped = [0.6, 0.8]
        expected = [1.0 - 0.5 * 0.1 - 0.5 * g / (g + 1.0) for g in clipped]
        assert module.weight[0].tolist() == pytest.approx(expected, rel=1e-5)

    def test_a_small_gradient_is_not_scaled_up(self):
        module = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(module.weight)
        engine = LocalEngine(module, Optimizer(lr=1.0, eps=1.0, max_grad_norm=100.0), num_steps=1)
        engine.backward(module.weight.sum())
        engine.step()
        assert module.weight.item() == pytest.approx(-0.5)

    def test_lr_counts_steps(self):
        engine = LocalEngine(net(), Optimizer(lr=1.0, warmup_steps=4), num_steps=8)
        assert engine.lr == 0.25
        train_step(engine, torch.randn(2, 4))
        assert engine.lr == 0.5

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_non_finite_gradient_skips_the_update(self, bad):
        module = net()
        engine = LocalEngine(module, Optimizer(lr=0.1, warmup_steps=9), num_steps=9)
        before = [parameter.detach().clone() for parameter in module.parameters()]
        engine.backward(module(torch.randn(2, 4)).sum() * bad)
        assert not math.isfinite(engine.step())
        for parameter, old in zip(module.parameters(), before, strict=True):
            assert torch.equal(parameter, old) and parameter.grad is None
        assert engine.lr == pytest.approx(0.1 * 2 / 9)
        assert math.isfinite(train_step(engine, torch.randn(2, 4)))
        assert not torch.equal(next(module.parameters()), before[0])

    def test_a_parameter_without_gradient_is_updated_like_a_zero_gradient(self):
        used, unused = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        module = nn.ModuleList([used, unused])
        engine = LocalEngine(module, Optimizer(lr=0.1, weight_decay=0.5), num_steps=1)
        before = unused.weight.item()
        engine.backward(used.weight.sum())
        engine.step()
        assert unused.weight.item() == pytest.approx(before * (1 - 0.1 * 0.5))

    def test_frozen_parameters_stay(self):
        module = net()
        module[0].requires_grad_(False)
        before = module[0].weight.clone()
        engine = LocalEngine(module, Optimizer(lr=0.1, weight_decay=0.1), num_steps=1)
        train_step(engine, torch.randn(2, 4))
        assert torch.equal(module[0].weight, before)

    def test_only_float32_is_trained(self):
        with pytest.raises(RecipeError, match=r"policy\.dtype: .*0\.weight is bfloat16"):
            LocalEngine(net().bfloat16(), Optimizer(), num_steps=1)

    def test_nothing_to_train(self):
        with pytest.raises(RecipeError, match="nothing to train"):
            trained_parameters(net().requires_grad_(False))


class TestLocalFiles:
    def test_a_loaded_engine_continues_identically(self, tmp_path):
        settings = Optimizer(lr=0.1, warmup_steps=9)
        data = torch.randn(4, 3, 4)
        straight = LocalEngine(net(), settings, num_steps=9)
        for x in data[:2]:
            train_step(straight, x)
        straight.save(tmp_path)
        loaded = LocalEngine(net(seed=1), settings, num_steps=9)
        loaded.load(tmp_path)
        assert loaded.lr == straight.lr == pytest.approx(0.1 * 3 / 9)
        for x in data[2:]:
            assert train_step(loaded, x) == train_step(straight, x)
        for one, other in zip(loaded.module.parameters(), straight.module.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_an_engine_that_never_stepped_can_be_loaded(self, tmp_path):
        LocalEngine(net(), Optimizer(), num_steps=1).save(tmp_path)
        engine = LocalEngine(net(seed=1), Optimizer(), num_steps=1)
        train_step(engine, torch.randn(2, 4))
        engine.load(tmp_path)
        assert torch.equal(engine.module[0].weight, net()[0].weight)
        assert engine._step == 0 and not engine._adam.state

    def test_files_are_safetensors_and_json(self, tmp_path):
        module = net()
        module[0].requires_grad_(False)
        engine = LocalEngine(module, Optimizer(), num_steps=1)
        train_step(engine, torch.randn(2, 4))
        engine.save(tmp_path)
        assert sorted(file.name for file in tmp_path.iterdir()) == [
            "engine.json",
            "state_00000_00.safetensors",
        ]
        written = json.loads((tmp_path / "engine.json").read_text())
        assert written == {"step": 1, "adam_steps": 1, "loss_scale": None, "world_size": 1}
        kinds = ("exp_avg", "exp_avg_sq", "weight")
        keys = sorted(load_file(tmp_path / "state_00000_00.safetensors"))
        assert keys == [f"{kind}/2.{name}" for kind in kinds for name in ("bias", "weight")]

    def test_large_states_are_written_in_parts(self, tmp_path, monkeypatch):
        monkeypatch.setattr("unified_rl.engine.state.PART_BYTES", 1)
        engine = LocalEngine(net(), Optimizer(), num_steps=1)
        train_step(engine, torch.randn(2, 4))
        engine.save(tmp_path)
        assert len(list(tmp_path.glob("state_*.safetensors"))) == 4
        again = LocalEngine(net(seed=1), Optimizer(), num_steps=1)
        again.load(tmp_path)
        assert train_step(again, torch.ones(1, 4)) == train_step(engine, torch.ones(1, 4))

    def test_another_model_or_engine_is_refused(self, tmp_path):
        LocalEngine(net(), Optimizer(), num_steps=1).save(tmp_path)
        wider = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        for module, named in ((nn.Linear(4, 2), r"0\.bias"), (wider, r"0\.weight")):
            with pytest.raises(CheckpointError, match=f"other trained parameters than now, for instance {named}"):
                LocalEngine(module, Optimizer(), num_steps=1).load(tmp_path)
        for content in ('{"engine": "deepspeed"}', "[]", "", '{"step": 1}'):
            (tmp_path / "engine.json").write_text(content)
            with pytest.raises(CheckpointError, match="no state of an engine"):
                LocalEngine(net(), Optimizer(), num_steps=1).load(tmp_path)

    def test_a_pickle_in_disguise_is_refused_unread(self, tmp_path):
        engine = LocalEngine(net(), Optimizer(), num_steps=1)
        engine.save(tmp_path)

        class Payload:
            def __reduce__(self):
                return Path.touch, (tmp_path / "executed",)

        torch.save(Payload(), tmp_path / "state_00000_00.safetensors")
        with pytest.raises(CheckpointError, match="no state of an engine"):
            engine.load(tmp_path)
        assert not (tmp_path / "executed").exists()


class TestBuildEngine:
    def build(self, **engine):
        return build_engine(net(), SimpleNamespace(engine=EngineBlock(**engine), optimizer=Optimizer()), num_steps=1)

    def test_one_process_is_local(self):
        engine = self.build()
        assert isinstance(engine, LocalEngine)
        assert (engine.rank, engine.world_size, sum(engine.sent_bytes.values())) == (0, 1, 0)

    def test_local_refuses_zero_stages(self):
        with pytest.raises(RecipeError, match=r"engine\.zero_stage: 2 needs backend auto or deepspeed"):
            self.build(backend="local", zero_stage=2)

    def test_local_refuses_several_processes(self, monkeypatch):
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        with pytest.raises(RecipeError, match=r"engine\.backend: local is one process, but 2 run"):
            self.build(backend="local")

    def test_deepspeed_is_imported_only_if_it_is_used(self):
        code = "import sys; import unified_rl.engine, unified_rl.engine.local; assert 'deepspeed' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_the_package_itself_needs_no_torch(self):
        code = "import sys; import unified_rl.engine; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestOneProcess:
    def test_helpers_are_identities(self):
        rows = torch.randn(2, 3)
        distributed.initialise(timeout_seconds=1)
        assert not torch.distributed.is_initialized()
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert distributed.sum_over_ranks([1, 2.5]) == [1.0, 2.5]
        assert distributed.max_over_ranks([1, 2.5]) == [1.0, 2.5]
        assert distributed.gather_rows(rows) is rows
        assert distributed.gather_objects([{"a": 1}]) == [{"a": 1}]
        assert distributed.broadcast_flag(True) and not distributed.broadcast_flag(False)
        distributed.barrier()
        distributed.shutdown()


class TestSlurm:
    step = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}

    def test_srun_is_adopted(self):
        job = {"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "gpu[07-09,12],big1"}
        assert distributed._adopt_slurm({**self.step, **job}) == {
            "RANK": "3",
            "WORLD_SIZE": "8",
            "LOCAL_RANK": "1",
            "MASTER_ADDR": "gpu07",
            "MASTER_PORT": str(20000 + 123456 % 20000),
        }

    def test_a_given_master_stays(self):
        adopted = distributed._adopt_slurm({**self.step, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"})
        assert set(adopted) == {"RANK", "WORLD_SIZE", "LOCAL_RANK"}

    def test_a_batch_script_is_one_process(self):
        assert distributed._adopt_slurm({**self.step, "SLURM_JOB_ID": "7"}) == {}

    def test_torchrun_inside_srun_wins(self):
        assert distributed._adopt_slurm({**self.step, "RANK": "0", "WORLD_SIZE": "2"}) == {}

    @pytest.mark.parametrize(
        "nodes,first", [("n1", "n1"), ("n1,n2", "n1"), ("a[1-3]", "a1"), ("a[01,05]-ib,b", "a01-ib"), ("x-[9]", "x-9")]
    )
    def test_first_host(self, nodes, first):
        assert distributed._slurm_master(nodes) == first


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Replaces the interpreter that `spawn` starts by a shell script with the given body."""

    def install(body: str) -> Path:
        script = tmp_path / "interpreter"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        monkeypatch.setattr(distributed, "GRACE_SECONDS", 0.3)
        return tmp_path

    return install


class TestSpawn:
    def test_variables_and_arguments(self, stub, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        names = "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $OMP_NUM_THREADS"
        folder = stub(f'echo "$@" {names} > "$(dirname "$0")/$RANK"; test "$MASTER_PORT" -gt 0')
        assert distributed.spawn(2, ["train", "x.yaml", "a=b c"]) == 0
        threads = max(1, torch.get_num_threads() // 2)
        for rank in range(2):
            expected = f"-m unified_rl.cli train x.yaml a=b c {rank} {rank} 2 2 127.0.0.1 {threads}\n"
            assert (folder / str(rank)).read_text() == expected

    @pytest.mark.parametrize("code", [1, 2, 143])
    def test_the_first_failure_is_returned(self, stub, code):
        stub(f"if [ $RANK = 1 ]; then exit {code}; fi; sleep 5; exit 7")
        assert distributed.spawn(2, []) == code

    def test_a_signal_is_128_plus_its_number(self, stub):
        stub("kill -SEGV $$")
        assert distributed.spawn(1, []) == 128 + signal.SIGSEGV

    def test_those_that_outlive_a_failure_are_ended(self, stub):
        stub("if [ $RANK = 1 ]; then exit 1; fi; trap '' TERM; while :; do sleep 0.1; done")
        start = time.monotonic()
        assert distributed.spawn(2, []) == 1
        assert time.monotonic() - start < 10

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signals_are_forwarded(self, stub, number):
        name = number.name.removeprefix("SIG")
        folder = stub(f'trap \'exit 143\' {name}; touch "$(dirname "$0")/up$RANK"; while :; do sleep 0.05; done')

        def send():
            while not all((folder / f"up{rank}").exists() for rank in range(2)):
                time.sleep(0.05)
            os.kill(os.getpid(), number)

        handler = signal.getsignal(number)
        sender = threading.Thread(target=send)
        sender.start()
        assert distributed.spawn(2, []) == 143
        sender.join()
        assert signal.getsignal(number) is handler

    @pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
    def test_a_killed_launcher_leaves_no_orphans(self, stub):
        real = sys.executable
        folder = stub('cd "$(dirname "$0")"; echo $$ > part$RANK; mv part$RANK pid$RANK; while :; do sleep 0.05; done')
        code = "import sys; from unified_rl.engine.distributed import spawn; sys.executable = sys.argv[1]; spawn(2, [])"
        launcher = subprocess.Popen([real, "-c", code, sys.executable])
        files = [folder / f"pid{rank}" for rank in range(2)]
        deadline = time.monotonic() + 60
        while not all(file.exists() for file in files) and time.monotonic() < deadline:
            time.sleep(0.05)
        launcher.kill()
        launcher.wait()
        children = [Path("/proc") / file.read_text().strip() for file in files]
        deadline = time.monotonic() + 10
        while any(_alive(child) for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(_alive(child) for child in children)


def _alive(process: Path) -> bool:
    """Whether a /proc entry is a running process (a zombie that nobody has waited for is not)."""
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
