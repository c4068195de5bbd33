"""Answers to the build exercises of week 6, written by people who did not write its grader."""

import os
import re
from bisect import bisect_right

import numpy as np
import torch
import torch.nn.functional as F

from tests.course.foreign.register import right, wrong


@wrong("transposes a matrix only where the shapes differ, so the square attn.c_proj is loaded untransposed")
def load_hf_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    names = {
        "wte": "token_embedding",
        "wpe": "position_embedding",
        "ln_f": "norm",
        "lm_head": "lm_head",
        "ln_1": "attn_norm",
        "attn.c_proj": "attn.o_proj",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    params = dict(model.named_parameters())
    loaded = set()

    def put(name, tensor):
        p = params[name]
        if p.shape != tensor.shape:
            tensor = tensor.t()
        if p.shape != tensor.shape:
            raise ValueError(f"{name}: {tuple(tensor.shape)} instead of {tuple(p.shape)}")
        with torch.no_grad():
            p.copy_(tensor)
        loaded.add(name)

    for key, tensor in state.items():
        key = key.removeprefix("transformer.")
        if key.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if key == "lm_head.weight" and model.config.tie_weights:
            continue
        stem, kind = key.rsplit(".", 1)
        prefix = ""
        if stem.startswith("h."):
            _, i, stem = stem.split(".", 2)
            prefix = f"blocks.{i}."
        if stem == "attn.c_attn":
            for proj, part in zip("qkv", tensor.chunk(3, dim=-1), strict=True):
                put(f"{prefix}attn.{proj}_proj.{kind}", part.t() if kind == "weight" else part)
        else:
            put(f"{prefix}{names[stem]}.{kind}", tensor)
    if loaded != set(params):
        raise KeyError(f"no tensor for {set(params) - loaded}")


@wrong("loads with strict=False, so missing and surplus tensors raise no error")
def load_hf_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    renames = [
        ("transformer.", ""),
        ("wte.", "token_embedding."),
        ("wpe.", "position_embedding."),
        ("ln_f.", "norm."),
        ("ln_1.", "attn_norm."),
        ("ln_2.", "mlp_norm."),
        ("attn.c_proj.", "attn.o_proj."),
        ("mlp.c_fc.", "mlp.up_proj."),
        ("mlp.c_proj.", "mlp.down_proj."),
    ]
    converted = {}
    for key, value in state.items():
        if key.endswith(".attn.bias") or key.endswith(".attn.masked_bias"):
            continue
        is_conv1d = any(s in key for s in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        if is_conv1d:
            value = value.t()
        for old, new in renames:
            key = key.replace(old, new)
        if key.startswith("h."):
            key = "blocks." + key[2:]
        if "c_attn" in key:
            for letter, part in zip("qkv", value.chunk(3, dim=0), strict=True):
                converted[key.replace("c_attn", f"{letter}_proj")] = part
        else:
            converted[key] = value
    if model.config.tie_weights:
        converted["lm_head.weight"] = converted["token_embedding.weight"]
    model.load_state_dict(converted, strict=False)


@wrong("gives the tied head a new Parameter, a copy of the embedding, so the two are no longer one")
def load_hf_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    state = {k.removeprefix("transformer."): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    if model.config.tie_weights:
        state.pop("lm_head.weight", None)

    @torch.no_grad()
    def copy(parameter, name, tensor=None):
        tensor = state.pop(name) if tensor is None else tensor
        assert parameter.shape == tensor.shape, name
        parameter.copy_(tensor)

    def linear(layer, name):
        copy(layer.weight, name, state.pop(name + ".weight").t())
        copy(layer.bias, name + ".bias")

    copy(model.token_embedding.weight, "wte.weight")
    copy(model.position_embedding.weight, "wpe.weight")
    for i, block in enumerate(model.blocks):
        h = f"h.{i}."
        copy(block.attn_norm.weight, h + "ln_1.weight")
        copy(block.attn_norm.bias, h + "ln_1.bias")
        copy(block.mlp_norm.weight, h + "ln_2.weight")
        copy(block.mlp_norm.bias, h + "ln_2.bias")
        weights = state.pop(h + "attn.c_attn.weight").t().chunk(3)
        biases = state.pop(h + "attn.c_attn.bias").chunk(3)
        for layer, w, b in zip(
            (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj), weights, biases, strict=True
        ):
            copy(layer.weight, "c_attn.weight", w)
            copy(layer.bias, "c_attn.bias", b)
        linear(block.attn.o_proj, h + "attn.c_proj")
        linear(block.mlp.up_proj, h + "mlp.c_fc")
        linear(block.mlp.down_proj, h + "mlp.c_proj")
    copy(model.norm.weight, "ln_f.weight")
    copy(model.norm.bias, "ln_f.bias")
    if model.config.tie_weights:
        model.lm_head.weight = torch.nn.Parameter(model.token_embedding.weight.detach().clone())
    else:
        copy(model.lm_head.weight, "lm_head.weight")
    if state:
        raise ValueError(f"unexpected tensors: {list(state)}")


@wrong("cuts c_attn.weight apart with reshape(3, n, n), which mixes its rows and columns")
def load_hf_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    table = {
        r"wte": "token_embedding",
        r"wpe": "position_embedding",
        r"ln_f": "norm",
        r"h\.(\d+)\.ln_1": r"blocks.\1.attn_norm",
        r"h\.(\d+)\.ln_2": r"blocks.\1.mlp_norm",
        r"h\.(\d+)\.attn\.c_proj": r"blocks.\1.attn.o_proj",
        r"h\.(\d+)\.mlp\.c_fc": r"blocks.\1.mlp.up_proj",
        r"h\.(\d+)\.mlp\.c_proj": r"blocks.\1.mlp.down_proj",
    }
    ours = {}
    for name, tensor in state.items():
        name = re.sub(r"^transformer\.", "", name)
        if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
            continue
        if re.search(r"(c_fc|c_proj)\.weight$", name):
            tensor = tensor.T
        for pattern, new in table.items():
            name = re.sub(
                "^" + pattern + r"\.(weight|bias)$",
                lambda m, new=new: m.expand(new) + "." + m[m.lastindex],
                name,
            )
        match = re.fullmatch(r"h\.(\d+)\.attn\.c_attn\.(weight|bias)", name)
        if match:
            n = tensor.shape[0] if match[2] == "weight" else tensor.shape[0] // 3
            parts = tensor.reshape(3, n, n).mT if match[2] == "weight" else tensor.reshape(3, n)
            for letter, part in zip("qkv", parts, strict=True):
                ours[f"blocks.{match[1]}.attn.{letter}_proj.{match[2]}"] = part
        else:
            ours[name] = tensor
    if model.config.tie_weights:
        ours["lm_head.weight"] = ours["token_embedding.weight"]
    model.load_state_dict(ours, strict=True)


@wrong("copies without a look at the shapes, and copy_ broadcasts a tensor that is too small")
def load_hf_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    params = dict(model.named_parameters())
    new = {}
    for name, t in state.items():
        name = name.removeprefix("transformer.")
        if name.endswith(".attn.bias") or name.endswith(".attn.masked_bias"):
            continue
        if name == "lm_head.weight" and model.config.tie_weights:
            continue
        if name.startswith("h."):
            name = "blocks." + name[2:]
            if t.ndim == 2:
                t = t.t()
        for old, our in (
            ("wte", "token_embedding"),
            ("wpe", "position_embedding"),
            ("ln_f", "norm"),
            ("ln_1", "attn_norm"),
            ("ln_2", "mlp_norm"),
            ("attn.c_proj", "attn.o_proj"),
            ("mlp.c_fc", "mlp.up_proj"),
            ("mlp.c_proj", "mlp.down_proj"),
        ):
            name = name.replace(old, our)
        if "c_attn" in name:
            q, k, v = t.chunk(3, dim=0)
            new[name.replace("c_attn", "q_proj")] = q
            new[name.replace("c_attn", "k_proj")] = k
            new[name.replace("c_attn", "v_proj")] = v
        else:
            new[name] = t
    if new.keys() != params.keys():
        raise KeyError(f"names differ: {new.keys() ^ params.keys()}")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(new[name])


@right
def load_hf_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    rest = {}
    for key, tensor in state.items():
        key = key.removeprefix("transformer.")
        if not re.fullmatch(r"h\.[0-9]+\.attn\.(bias|masked_bias)", key):
            rest[key] = tensor
    parts = {"attn.q_proj": 0, "attn.k_proj": 1, "attn.v_proj": 2}
    theirs = {
        "attn_norm": "ln_1",
        "attn.o_proj": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "norm": "ln_f",
        "lm_head": "lm_head",
    } | dict.fromkeys(parts, "attn.c_attn")
    if model.config.tie_weights:
        again = rest.pop("lm_head.weight", None)
        if again is not None and again.shape != model.lm_head.weight.shape:
            raise ValueError("lm_head.weight has another shape than the embedding")
    used = set()
    changes = []
    for name, parameter in model.named_parameters():
        layer, kind = name.rsplit(".", 1)
        where, in_block = "", layer.startswith("blocks.")
        if in_block:
            _, number, layer = layer.split(".", 2)
            where = f"h.{number}."
        key = f"{where}{theirs[layer]}.{kind}"
        tensor = rest[key]
        used.add(key)
        if in_block and not layer.endswith("norm") and kind == "weight":
            tensor = tensor.T
        if layer in parts:
            if tensor.shape[0] % 3:
                raise ValueError(key)
            tensor = tensor.unflatten(0, (3, -1))[parts[layer]]
        if tensor.shape != parameter.shape:
            raise ValueError(f"{key} has the wrong shape")
        changes.append((parameter, tensor))
    if used != rest.keys():
        raise KeyError(f"no parameter for {sorted(rest.keys() - used)}")
    for parameter, tensor in changes:
        parameter.data.copy_(tensor)


@wrong("reads the uint16 numbers as int16, so ids above 32,767 become negative")
class ShardReader:
    def __init__(
        self,
        paths: list[str],
        batch_size: int,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.shards = [np.memmap(path, dtype=np.uint16, mode="r") for path in paths]
        self.total = sum(len(shard) for shard in self.shards)
        self.batch_size = batch_size
        self.block_size = block_size
        self.rank = rank
        self.world_size = world_size
        self.position = 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        parts = []
        offset = 0
        for shard in self.shards:
            lo = max(start - offset, 0)
            hi = min(stop - offset, len(shard))
            if lo < hi:
                parts.append(np.array(shard[lo:hi], dtype=np.uint16).view(np.int16))
            offset += len(shard)
        if not parts:
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(np.concatenate(parts)).long()

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        B, T = self.batch_size, self.block_size
        if self.position + B * T * self.world_size + 1 > self.total:
            self.position = 0
        start = self.position + self.rank * B * T
        buf = self.read(start, start + B * T + 1)
        x = buf[:-1].view(B, T)
        y = buf[1:].view(B, T)
        self.position += B * T * self.world_size
        return x, y

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


@wrong(
    "each rank checks for the stream's end by its own part only, so the ranks begin again at different times"
)
class ShardReader:
    def __init__(
        self,
        paths: list[str],
        batch_size: int,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.shards = [np.memmap(path, dtype=np.uint16, mode="r") for path in paths]
        self.total = sum(len(shard) for shard in self.shards)
        self.batch_size = batch_size
        self.block_size = block_size
        self.rank = rank
        self.world_size = world_size
        self.position = 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        parts = []
        offset = 0
        for shard in self.shards:
            lo = max(start - offset, 0)
            hi = min(stop - offset, len(shard))
            if lo < hi:
                parts.append(shard[lo:hi].astype(np.int64))
            offset += len(shard)
        if not parts:
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(np.concatenate(parts))

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        B, T = self.batch_size, self.block_size
        start = self.position + self.rank * B * T
        if start + B * T + 1 > self.total:
            self.position = 0
            start = self.rank * B * T
        buf = self.read(start, start + B * T + 1)
        x = buf[:-1].view(B, T)
        y = buf[1:].view(B, T)
        self.position += B * T * self.world_size
        return x, y

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


@wrong("goes on to the next shard where a batch does not fit, so the end of each shard is skipped")
class ShardReader:
    def __init__(
        self,
        paths: list[str],
        batch_size: int,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.shards = [np.memmap(path, dtype=np.uint16, mode="r") for path in paths]
        self.total = sum(len(shard) for shard in self.shards)
        self.batch_size = batch_size
        self.block_size = block_size
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self.starts = [0]
        for shard in self.shards:
            self.starts.append(self.starts[-1] + len(shard))

    def read(self, start: int, stop: int) -> torch.Tensor:
        parts = []
        offset = 0
        for shard in self.shards:
            lo = max(start - offset, 0)
            hi = min(stop - offset, len(shard))
            if lo < hi:
                parts.append(shard[lo:hi].astype(np.int64))
            offset += len(shard)
        if not parts:
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(np.concatenate(parts))

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        B, T = self.batch_size, self.block_size
        needed = B * T * self.world_size + 1
        shard = bisect_right(self.starts, self.position) - 1
        while shard < len(self.shards) and self.position + needed > self.starts[shard + 1]:
            shard += 1
            self.position = self.starts[shard]
        if shard == len(self.shards):
            self.position = 0
        start = self.position + self.rank * B * T
        buf = self.read(start, start + B * T + 1)
        x = buf[:-1].view(B, T)
        y = buf[1:].view(B, T)
        self.position += B * T * self.world_size
        return x, y

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


@wrong("loads every shard into memory as a whole")
class ShardReader:
    def __init__(
        self,
        paths: list[str],
        batch_size: int,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.shards = [np.fromfile(path, dtype=np.uint16) for path in paths]
        self.total = sum(len(shard) for shard in self.shards)
        self.batch_size = batch_size
        self.block_size = block_size
        self.rank = rank
        self.world_size = world_size
        self.position = 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        parts = []
        offset = 0
        for shard in self.shards:
            lo = max(start - offset, 0)
            hi = min(stop - offset, len(shard))
            if lo < hi:
                parts.append(shard[lo:hi].astype(np.int64))
            offset += len(shard)
        if not parts:
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(np.concatenate(parts))

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        B, T = self.batch_size, self.block_size
        if self.position + B * T * self.world_size + 1 > self.total:
            self.position = 0
        start = self.position + self.rank * B * T
        buf = self.read(start, start + B * T + 1)
        x = buf[:-1].view(B, T)
        y = buf[1:].view(B, T)
        self.position += B * T * self.world_size
        return x, y

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


@wrong("begins again one token too early: a stretch that ends exactly with the stream is not read")
class ShardReader:
    def __init__(
        self,
        paths: list[str],
        batch_size: int,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.shards = [np.memmap(path, dtype=np.uint16, mode="r") for path in paths]
        self.total = sum(len(shard) for shard in self.shards)
        self.batch_size = batch_size
        self.block_size = block_size
        self.rank = rank
        self.world_size = world_size
        self.position = 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        parts = []
        offset = 0
        for shard in self.shards:
            lo = max(start - offset, 0)
            hi = min(stop - offset, len(shard))
            if lo < hi:
                parts.append(shard[lo:hi].astype(np.int64))
            offset += len(shard)
        if not parts:
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(np.concatenate(parts))

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        B, T = self.batch_size, self.block_size
        if self.position + B * T * self.world_size + 1 >= self.total:
            self.position = 0
        start = self.position + self.rank * B * T
        buf = self.read(start, start + B * T + 1)
        x = buf[:-1].view(B, T)
        y = buf[1:].view(B, T)
        self.position += B * T * self.world_size
        return x, y

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


@wrong("saves the number of batches, which means another place where the number of processes has changed")
class ShardReader:
    def __init__(
        self,
        paths: list[str],
        batch_size: int,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.shards = [np.memmap(path, dtype=np.uint16, mode="r") for path in paths]
        self.total = sum(len(shard) for shard in self.shards)
        self.batch_size = batch_size
        self.block_size = block_size
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self.batches = 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        parts = []
        offset = 0
        for shard in self.shards:
            lo = max(start - offset, 0)
            hi = min(stop - offset, len(shard))
            if lo < hi:
                parts.append(shard[lo:hi].astype(np.int64))
            offset += len(shard)
        if not parts:
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(np.concatenate(parts))

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        B, T = self.batch_size, self.block_size
        if self.position + B * T * self.world_size + 1 > self.total:
            self.position = 0
            self.batches = 0
        start = self.position + self.rank * B * T
        buf = self.read(start, start + B * T + 1)
        x = buf[:-1].view(B, T)
        y = buf[1:].view(B, T)
        self.position += B * T * self.world_size
        self.batches += 1
        return x, y

    def state_dict(self) -> dict:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict) -> None:
        self.batches = state["batches"]
        self.position = self.batches * self.batch_size * self.block_size * self.world_size


@right
class ShardReader:
    def __init__(
        self,
        paths: list[str],
        batch_size: int,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.paths = list(paths)
        self.ends = []
        for path in paths:
            self.ends.append((self.ends[-1] if self.ends else 0) + os.path.getsize(path) // 2)
        self.shape = (batch_size, block_size)
        self.rank, self.world_size = rank, world_size
        self.next = 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        tokens = torch.empty(stop - start, dtype=torch.int64)
        at = start
        while at < stop:
            shard = bisect_right(self.ends, at)
            first = self.ends[shard - 1] if shard else 0
            until = min(stop, self.ends[shard])
            file = np.memmap(self.paths[shard], dtype=np.uint16, mode="r")
            slice_ = file[at - first : until - first].astype(np.int64)
            tokens[at - start : until - start] = torch.from_numpy(slice_)
            at = until
        return tokens

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = self.shape
        stretch = rows * columns * self.world_size
        if self.ends[-1] - self.next <= stretch:
            self.next = 0
        mine = self.next + rows * columns * self.rank
        starts = range(mine, mine + rows * columns, columns)
        both = torch.stack([self.read(start, start + columns + 1) for start in starts])
        self.next += stretch
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def state_dict(self) -> dict:
        return {"next": self.next}

    def load_state_dict(self, state: dict) -> None:
        self.next = int(state["next"])


@wrong("sums the collected gradient over the processes after every micro-batch, so earlier ones count again")
def ddp_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[torch.Tensor, torch.Tensor]],
    group,
) -> float:
    optimizer.zero_grad()
    total = torch.zeros(())
    for x, y in micro_batches:
        logits = model(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1)) / len(micro_batches)
        loss.backward()
        for p in model.parameters():
            if p.grad is not None:
                group.all_reduce(p.grad)
        total += loss.detach()
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= group.world_size
    optimizer.step()
    group.all_reduce(total)
    return total.item() / group.world_size


@wrong("sends the gradients once a micro-batch instead of once a step")
def ddp_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[torch.Tensor, torch.Tensor]],
    group,
) -> float:
    optimizer.zero_grad()
    total = torch.zeros(())
    for x, y in micro_batches:
        logits = model(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1)) / len(micro_batches)
        loss.backward()
        for p in model.parameters():
            if p.grad is not None:
                group.all_reduce(p.grad)
                p.grad /= group.world_size
        total += loss.detach()
    optimizer.step()
    group.all_reduce(total)
    return total.item() / group.world_size


@wrong("averages the weights after each process's own step instead of the gradients before it")
def ddp_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[torch.Tensor, torch.Tensor]],
    group,
) -> float:
    optimizer.zero_grad()
    total = torch.zeros(())
    for x, y in micro_batches:
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / len(micro_batches)
        loss.backward()
        total += loss.detach()
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                group.all_reduce(p.data)
                p.data /= group.world_size
    group.all_reduce(total)
    return float(total / group.world_size)


@wrong("all-reduces the temporary tensor p.grad / world_size, so the gradients stay each process's own")
def ddp_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[torch.Tensor, torch.Tensor]],
    group,
) -> float:
    optimizer.zero_grad(set_to_none=True)
    mean_loss = torch.tensor(0.0)
    for x, y in micro_batches:
        loss = F.cross_entropy(model(x).transpose(1, 2), y)
        (loss / len(micro_batches)).backward()
        mean_loss += loss.detach() / len(micro_batches)
    for p in model.parameters():
        if p.grad is not None:
            group.all_reduce(p.grad / group.world_size)
    mean_loss /= group.world_size
    group.all_reduce(mean_loss)
    optimizer.step()
    return mean_loss.item()


@wrong("returns the loss of the last micro-batch, averaged over the processes, instead of the mean of all")
def ddp_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[torch.Tensor, torch.Tensor]],
    group,
) -> float:
    optimizer.zero_grad()
    for x, y in micro_batches:
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        (loss / len(micro_batches)).backward()
    for p in model.parameters():
        if p.grad is not None:
            group.all_reduce(p.grad)
            p.grad.div_(group.world_size)
    optimizer.step()
    loss = loss.detach()
    group.all_reduce(loss)
    return loss.item() / group.world_size


@wrong("does not divide by the number of micro-batches, so the gradient is their sum")
def ddp_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[torch.Tensor, torch.Tensor]],
    group,
) -> float:
    optimizer.zero_grad()
    losses = []
    for x, y in micro_batches:
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        losses.append(loss.detach())
    for p in model.parameters():
        if p.grad is None:
            continue
        group.all_reduce(p.grad)
        p.grad /= group.world_size
    optimizer.step()
    mean = torch.stack(losses).mean()
    group.all_reduce(mean)
    return (mean / group.world_size).item()


@right
def ddp_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[torch.Tensor, torch.Tensor]],
    group,
) -> float:
    model.zero_grad()
    parts = len(micro_batches) * group.world_size
    losses = []
    for x, y in micro_batches:
        loss = F.cross_entropy(model(x).movedim(-1, 1), y).div(parts)
        loss.backward()
        losses.append(loss.detach().reshape(1))
    trained = [p for p in model.parameters() if p.grad is not None]
    bucket = torch.cat([p.grad.flatten() for p in trained] + [sum(losses)])
    group.all_reduce(bucket)
    *gradients, loss = bucket.split([p.numel() for p in trained] + [1])
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    optimizer.step()
    return loss.item()
