# SPDX-License-Identifier: Apache-2.0
"""route: one warp a token.

    grid     ceil(num_tokens / 4) CTAs of 4 warps
    load     lane l reads the logits of experts l, l + 32, ... and keeps their sort keys in shared memory
    select   top_k times: warp-wide maximum of every lane's best key, ties to the lower id; its owner looks for the next
    weigh    lane k holds slot k: sums over slots in float64, one rounding to float32, one to bfloat16

Keys, sums and roundings are those of the CPU definition (kernels/route.py), so ids are bit-equal with it.
"""

from tvm.script import tirx as T

from tvmmoe.config import RoutingMethodType as Method
from tvmmoe.kernels import numerics
from tvmmoe.kernels.sm90a.trace import (
    I,
    Smem,
    address,
    assign,
    bits,
    cast,
    cuda,
    for_,
    if_,
    if_else,
    kernel,
    let,
    ptx,
    scalar,
    shuffle,
    store_to,
    u32,
    warp_max_s32,
    warp_min_s32,
)  # fmt: skip

WARPS = 4
MAX_EXPERTS = 1024
BATCH = 4  # loads of a lane that are under way at once
CLOSED = -(2**31)  # key of an expert that may not be chosen; only a NaN of one pattern shares it
NONE = 2**31 - 1
LOWEST = -2139095041  # key of -inf


def _key_to_float(key):
    """The float32 that ``numerics.sortable_key`` came from: the map is its own inverse."""
    return bits(key ^ ((key >> 31) & T.int32(0x7FFFFFFF)), "float32")


class Token:
    """Code of one warp's token, stage by stage."""

    def __init__(self, a, token, lane, keys, group_keys):
        self.a, self.token, self.lane, self.keys, self.group_keys = a, token, lane, keys, group_keys
        self.method = let(cast(a.routing_method, "int32"))
        self.num_experts = let(cast(a.num_experts, "int32"))
        self.top_k = let(cast(a.top_k, "int32"))
        self.n_group = let(cast(a.n_group, "int32"))
        self.best_key, self.best_id = scalar("int32"), scalar("int32")

    def is_method(self, *methods: Method):
        condition = self.method == int(methods[0])
        for method in methods[1:]:
            condition = T.Or(condition, self.method == int(method))
        return condition

    def _raw(self, pointer, is_bf16, index):
        """Bits of a bf16 or float32 element; :meth:`_value` converts them, so that many loads are under way at once."""
        raw = scalar("uint32")
        if_else(
            is_bf16 != 0,
            lambda: ptx["ld.global.u16"](raw, address(pointer, index * 2)),
            lambda: ptx["ld.global.b32"](raw, address(pointer, index * 4)),
        )
        return raw

    @staticmethod
    def _value(raw, is_bf16):
        return let(bits(T.Select(is_bf16 != 0, raw << u32(16), raw), "float32"))

    def _without_nan(self, x):
        """Llama4 takes NaN for -inf."""
        with if_(T.And(self.is_method(Method.Llama4), numerics.is_nan(x))):
            assign(x, T.float32(float("-inf")))

    def _raw_logit(self, e):
        return self._raw(
            self.a.routing_logits, self.a.logits_is_bf16,
            let(cast(self.token, "int64") * self.a.num_experts + cast(e, "int64")),
        )  # fmt: skip

    def logit(self, e):
        """Logit of expert ``e`` as float32."""
        return self._value(self._raw_logit(e), self.a.logits_is_bf16)

    def _bias(self, raw):
        b = self._value(raw, self.a.bias_is_bf16)
        with if_(self.n_group > 1):  # the grouped path adds a bias rounded to bfloat16
            assign(b, numerics.bf16_to_float32(let(numerics.float32_to_bf16(b))))
        return b

    def for_own_experts(self):
        """Loop over the experts of this lane."""
        return _strided(self.num_experts, self.lane)

    def write_keys(self) -> None:
        a = self.a
        has_bias = let(cast(T.And(self.is_method(Method.DeepSeekV3, Method.MiniMax2), a.routing_bias != 0), "int32"))
        uses_sigmoid = self.is_method(Method.DeepSeekV3, Method.MiniMax2, Method.SigmoidRenorm, Method.Sigmoid)
        with for_((self.num_experts + 32 * BATCH - 1) // (32 * BATCH)) as batch:
            experts = [let(T.min((batch * BATCH + i) * 32 + self.lane, self.num_experts - 1)) for i in range(BATCH)]
            logits = [self._raw_logit(e) for e in experts]
            biases = [scalar("uint32", u32(0)) for _ in experts]
            with if_(has_bias != 0):
                for e, bias in zip(experts, biases, strict=True):
                    assign(bias, self._raw(a.routing_bias, a.bias_is_bf16, cast(e, "int64")))
            for e, raw, bias in zip(experts, logits, biases, strict=True):
                x = self._value(raw, a.logits_is_bf16)
                self._without_nan(x)
                score = let(x)
                with if_(uses_sigmoid):
                    assign(score, numerics.sigmoid_exact(x))
                with if_(has_bias != 0):
                    assign(score, score + self._bias(bias))
                self.keys.put(e, numerics.sortable_key(score))  # past the end: the last expert's once more
        with if_(self.is_method(Method.Default)):
            self._softmax_keys()

    def _softmax_keys(self) -> None:
        """Default ranks by the softmax itself: its rounding decides ties."""
        self.find_best(self.keys, self.num_experts)
        maximum = let(cast(_key_to_float(let(warp_max_s32(self.best_key))), "float64"))
        total = scalar("float64", T.float64(0))
        with self.for_own_experts() as e:
            x = let(_key_to_float(let(self.keys[e])))
            assign(total, total + numerics.exp_float64(cast(x, "float64") - maximum))
        assign(total, T.cuda.warp_sum(total))
        with self.for_own_experts() as e:
            x = let(_key_to_float(let(self.keys[e])))
            p = let(cast(numerics.exp_float64(cast(x, "float64") - maximum) / total, "float32"))
            self.keys.put(e, numerics.sortable_key(p))

    def find_best(self, keys, count) -> None:
        """This lane's best (key, id) among its entries; strict comparison keeps the lowest id."""
        assign(self.best_key, T.int32(CLOSED))
        assign(self.best_id, T.int32(NONE))
        with for_((count + 32 * BATCH - 1) // (32 * BATCH)) as batch:
            entries = [let((batch * BATCH + i) * 32 + self.lane) for i in range(BATCH)]
            for e, key in [(e, let(keys[T.min(e, count - 1)])) for e in entries]:
                with if_(T.And(key > self.best_key, e < count)):
                    assign(self.best_key, key)
                    assign(self.best_id, e)

    def take_best(self, keys, count):
        """Id of the best entry of the warp, which becomes CLOSED."""
        best = let(warp_max_s32(self.best_key))
        chosen = let(warp_min_s32(let(T.Select(self.best_key == best, self.best_id, T.int32(NONE)))))
        with if_(T.And(chosen == self.best_id, chosen != NONE)):
            keys.put(chosen, T.int32(CLOSED))
            self.find_best(keys, count)
        return let(T.min(chosen, count - 1))

    def close_groups(self) -> None:
        """DeepSeekV3: only experts of the topk_group groups with the largest sum of two stay open."""
        size = let(self.num_experts // self.n_group)
        cuda.warp_sync()
        with _strided(self.n_group, self.lane) as g:
            first = scalar("int32", T.int32(LOWEST))
            second = scalar("int32", first)
            with for_((size + BATCH - 1) // BATCH) as batch:
                offsets = [let(batch * BATCH + i) for i in range(BATCH)]
                for offset, key in [(i, let(self.keys[g * size + T.min(i, size - 1)])) for i in offsets]:
                    with if_(offset < size):
                        assign(second, T.max(second, T.min(first, key)))
                        assign(first, T.max(first, key))
            total = let(_key_to_float(first) + _key_to_float(second))
            self.group_keys.put(g, numerics.sortable_key(total))
        self.find_best(self.group_keys, self.n_group)
        with for_(cast(self.a.topk_group, "int32")):
            self.take_best(self.group_keys, self.n_group)
        cuda.warp_sync()
        with self.for_own_experts() as e:
            with if_(self.group_keys[e // size] != CLOSED):
                self.keys.put(e, T.int32(CLOSED))

    def select(self):
        """Lane k gets the id of slot k (lanes beyond top_k: slot 0's) and, for Default, its softmax."""
        mine, share = scalar("int32", T.int32(0)), scalar("float32", T.float32(0))
        self.find_best(self.keys, self.num_experts)
        with for_(self.top_k) as k:
            key = let(warp_max_s32(self.best_key))
            chosen = self.take_best(self.keys, self.num_experts)
            with if_(T.Or(self.lane == k, k == 0)):
                assign(mine, chosen)
                assign(share, _key_to_float(key))
        return mine, share

    def weight(self, expert, share):
        """bfloat16 bits of this lane's slot."""
        a, x = self.a, self.logit(expert)
        self._without_nan(x)
        is_slot = self.lane < self.top_k
        sigmoid = let(numerics.sigmoid_exact(x))
        softmax = self.is_method(Method.Renormalize, Method.RenormalizeNaive)
        e = let(numerics.exp_float64(cast(x, "float64") - cast(shuffle(x, T.int32(0)), "float64")))
        term = let(T.Select(softmax, e, cast(sigmoid, "float64")))
        total = let(T.cuda.warp_sum(T.Select(is_slot, term, T.float64(0))))
        weight = let(T.Select(self.is_method(Method.TopK), x, sigmoid))
        with if_(self.is_method(Method.Default)):
            assign(weight, share)
        with if_(softmax):
            assign(weight, cast(e / total, "float32"))
        with if_(T.And(self.is_method(Method.SigmoidRenorm), a.norm_topk_prob != 0)):
            # Not T.max, which would replace NaN.
            assign(weight, cast(term / T.Select(total < T.float64(1e-20), T.float64(1e-20), total), "float32"))
        with if_(self.is_method(Method.DeepSeekV3, Method.MiniMax2)):
            assign(weight, cast(term * a.routed_scaling_factor / (total + T.float64(1e-20)), "float32"))
        return let(numerics.float32_to_bf16(weight))

    def route(self):
        """(expert, bfloat16 bits of its weight) of slot ``lane``; lanes past top_k hold slot 0's expert."""
        self.write_keys()
        with if_(T.And(self.is_method(Method.DeepSeekV3), self.n_group > 1)):
            self.close_groups()
        expert, share = self.select()
        return expert, self.weight(expert, share)

    def write(self, expert, weight) -> None:
        """The results of slot ``lane``."""
        a = self.a
        with if_(self.lane < self.top_k):
            slot = let(cast(self.token, "int64") * a.top_k + cast(self.lane, "int64"))
            store_to("int32", address(a.ws["topk_ids"], slot * 4), expert)
            store_to("uint16", address(a.result("expert_weights"), slot * 2), weight)
            with if_(a.routing_replay_out != 0):
                store_to("int16", address(a.routing_replay_out, slot * 2), let(cast(expert, "int16")))


class _strided:
    """Loop over lane, lane + 32, ... below ``count``."""

    def __init__(self, count, lane):
        self._loop = for_((count + 31) // 32)
        self._count, self._lane = count, lane

    def __enter__(self):
        index = let(self._loop.__enter__() * 32 + self._lane)
        self._guard = if_(index < self._count)
        self._guard.__enter__()
        return index

    def __exit__(self, *error):
        self._guard.__exit__(*error)
        return self._loop.__exit__(*error)


class _Offset:
    """A warp's part of a shared buffer."""

    def __init__(self, buffer, base):
        self._buffer, self._base = buffer, base

    def __getitem__(self, index):
        return self._buffer[self._base + index]

    def put(self, index, value) -> None:
        I.buffer_store(self._buffer, value, [self._base + index])


class Router:
    """Shared memory of ``warps`` warps that route a token each."""

    def __init__(self, smem: Smem, warps: int):
        self._keys = [smem.alloc(warps * MAX_EXPERTS, "int32", 128) for _ in range(2)]

    def token(self, a, token, thread) -> Token:
        """The calling warp's token."""
        base = let(thread.warp * MAX_EXPERTS)
        return Token(a, token, thread.lane, *(_Offset(buffer, base) for buffer in self._keys))


def route(a) -> None:
    """Emit the kernel."""
    with kernel("route", cast((a.num_tokens + WARPS - 1) // WARPS, "int32"), WARPS * 32) as thread:
        smem = Smem()
        router = Router(smem, WARPS)
        smem.commit()
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()
        token = let(thread.cta * WARPS + thread.warp)
        with if_(cast(token, "int64") < a.num_tokens):
            t = router.token(a, token, thread)
            t.write(*t.route())
