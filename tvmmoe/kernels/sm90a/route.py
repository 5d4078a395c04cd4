# SPDX-License-Identifier: Apache-2.0
"""route: logits -> top_k experts and weights of every token.

    grid     ceil(num_tokens / tokens_per_cta) CTAs of 8 warps; as few tokens a CTA as let all CTAs be on the card at once
    load     all threads share the experts of the CTA's tokens: scores and sort keys into shared memory
    select   one warp a token. Lane l holds the keys of ``per_lane`` neighbouring experts in registers; top_k times the
             warp takes the largest (ties: the lowest lane, so the lowest id) and its owner closes it
    weigh    lane k holds slot k: sums over slots in float64, one rounding to float32, one to bfloat16

Keys, sums and roundings are those of the CPU definition (kernels/route.py), so ids are bit-equal with it.
"""

from tvm.script import tirx as T

from tvmmoe.config import MAX_EXPERTS, MAX_TOP_K
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
    regs,
    scalar,
    shuffle,
    shuffle_xor,
    store,
    store_to,
    u32,
    warp_max_s32,
)  # fmt: skip

WARPS = 8
THREADS = 32 * WARPS
ENTRIES = 2048  # (token, expert) pairs that a CTA holds
ONE_WAVE = 264  # CTAs of this size that the card holds at once
BATCH = 4  # loads of a thread that are under way at once
PER_LANE = (4, 8, MAX_EXPERTS // 32)  # experts of a lane that select is compiled for
CLOSED = -(2**31)  # key of an expert that may not be chosen; only a NaN of one pattern shares it
LOWEST = -2139095041  # key of -inf
TINY = 0x3BC79CA10C924223  # bits of 1e-20, which generated source would print as 0


def _key_to_float(key):
    """The float32 that ``numerics.sortable_key`` came from: the map is its own inverse."""
    return bits(key ^ ((key >> 31) & T.int32(0x7FFFFFFF)), "float32")


def _best(keys) -> tuple:
    """(largest key, its position); ties to the lower position."""
    entries = [(key, T.int32(i)) for i, key in enumerate(keys)]
    while len(entries) > 1:
        pairs = zip(entries[::2], entries[1::2], strict=True)
        entries = [
            (let(T.max(low[0], high[0])), let(T.Select(high[0] > low[0], high[1], low[1]))) for low, high in pairs
        ]
    return entries[0]


class Router:
    """Scores, keys and choices of the tokens ``first`` ... ``first + num_tokens`` - 1 of a CTA."""

    def __init__(
        self, a, smem: Smem, max_tokens: int, threads: int = THREADS, entries: int = ENTRIES,
        per_lane: tuple[int, ...] = PER_LANE, space: str = "global",
    ):  # fmt: skip
        """For so many (token, expert) pairs, experts a lane as listed, and logits and biases in ``space``."""
        self.a, self.threads, self.entries, self.per_lane, self.space = a, threads, entries, per_lane, space
        self._keys, self._group_keys = (smem.alloc(entries, "int32", 128) for _ in range(2))
        self._scores = smem.alloc(entries, "float32", 128)
        self._is_open = smem.alloc(entries, "uint8", 128)
        self._chosen = smem.alloc(max_tokens * MAX_TOP_K, "int32", 128)

    def begin(self, thread, first, num_tokens) -> None:
        """Registers that the stages share."""
        a = self.a
        self.thread, self.lane, self.first, self.num_tokens = thread, thread.lane, first, num_tokens
        self.method = let(cast(a.routing_method, "int32"))
        self.num_experts = let(cast(a.num_experts, "int32"))
        self.top_k = let(cast(a.top_k, "int32"))
        self.n_group = let(cast(a.n_group, "int32"))
        self.is_grouped = T.And(self.is_method(Method.DeepSeekV3), self.n_group > 1)
        self.uses_sigmoid = self.is_method(Method.DeepSeekV3, Method.MiniMax2, Method.SigmoidRenorm, Method.Sigmoid)

    def is_method(self, *methods: Method):
        condition = self.method == int(methods[0])
        for method in methods[1:]:
            condition = T.Or(condition, self.method == int(method))
        return condition

    # ------------------------------------------------------------------------------------------- keys, whole CTA

    def _raw(self, pointer, is_bf16, index):
        """Bits of a bf16 or float32 element; :meth:`_value` converts them, so that many loads are under way at once."""
        raw = scalar("uint32")
        if_else(
            is_bf16 != 0,
            lambda: ptx[f"ld.{self.space}.u16"](raw, address(pointer, index * 2)),
            lambda: ptx[f"ld.{self.space}.b32"](raw, address(pointer, index * 4)),
        )
        return raw

    @staticmethod
    def _value(raw, is_bf16):
        return let(bits(T.Select(is_bf16 != 0, raw << u32(16), raw), "float32"))

    def write_keys(self) -> None:
        """Scores and keys of all experts; the CTA synchronises before anyone chooses."""
        a = self.a
        count = let(self.num_tokens * self.num_experts)
        start = let(cast(self.first, "int64") * a.num_experts)
        has_bias = let(cast(T.And(self.is_method(Method.DeepSeekV3, Method.MiniMax2), a.routing_bias != 0), "int32"))

        def write(places, inside):
            logits = [self._raw(a.routing_logits, a.logits_is_bf16, start + cast(i, "int64")) for i in inside]
            biases = [scalar("uint32", u32(0)) for _ in inside]
            with if_(has_bias != 0):
                for i, bias in zip(inside, biases, strict=True):
                    e = cast(i % self.num_experts, "int64")
                    assign(bias, self._raw(a.routing_bias, a.bias_is_bf16, e))
            for place, raw, bias in zip(places, logits, biases, strict=True):
                with if_(place < count):
                    self._write_key(place, self._value(raw, a.logits_is_bf16), bias, has_bias)

        if self.entries <= 2 * self.threads:  # in every CTA of the card: who has no key asks for none, or again for its own
            tid = self.thread.tid
            with if_(tid < count):
                places = [let(tid + first) for first in range(0, self.entries, self.threads)]
                write(places, [let(T.Select(place < count, place, tid)) for place in places])
            return
        with for_((count + self.threads * BATCH - 1) // (self.threads * BATCH)) as batch:
            places = [let((batch * BATCH + i) * self.threads + self.thread.tid) for i in range(BATCH)]
            write(places, [let(T.min(place, count - 1)) for place in places])

    def _write_key(self, place, x, raw_bias, has_bias) -> None:
        with if_(T.And(self.is_method(Method.Llama4), numerics.is_nan(x))):  # it takes NaN for -inf
            assign(x, T.float32(float("-inf")))
        with if_(self.uses_sigmoid):
            assign(x, numerics.sigmoid_exact(x))
        I.buffer_store(self._scores, x, [place])
        key = let(x)
        with if_(has_bias != 0):
            bias = self._value(raw_bias, self.a.bias_is_bf16)
            with if_(self.n_group > 1):  # the grouped path adds a bias rounded to bfloat16
                assign(bias, numerics.bf16_to_float32(let(numerics.float32_to_bf16(bias))))
            assign(key, x + bias)
        I.buffer_store(self._keys, numerics.sortable_key(key), [place])

    # ------------------------------------------------------------------------------------------ choice, one warp

    def choose(self, token):
        """(expert, key as float32) of slot ``lane`` of the CTA's ``token``; lanes past top_k hold slot 0."""
        base = let(token * self.num_experts)
        with if_(self.is_method(Method.Default)):
            self._softmax_keys(base)
        with if_(self.is_grouped):
            self._open_groups(base)
        slots, key = let(token * MAX_TOP_K), scalar("float32", T.float32(0))
        self._select_by_size(base, slots, key, self.per_lane)
        cuda.warp_sync()
        slot = T.Select(self.lane < self.top_k, self.lane, T.int32(0))
        return let(self._chosen[slots + slot]), key

    def _select_by_size(self, base, slots, key, sizes) -> None:
        """By the smallest of ``sizes`` that holds the experts."""

        def select():
            self._select(base, slots, sizes[0], key)

        if len(sizes) == 1:
            select()
        else:
            fits = self.num_experts <= 32 * sizes[0]
            if_else(fits, select, lambda: self._select_by_size(base, slots, key, sizes[1:]))

    def _softmax_keys(self, base) -> None:
        """Default ranks by the softmax itself: its rounding decides ties."""
        best = scalar("int32", T.int32(CLOSED))
        with _strided(self.num_experts, self.lane) as e:
            assign(best, T.max(best, self._keys[base + e]))
        maximum = let(cast(_key_to_float(let(warp_max_s32(best))), "float64"))
        total = scalar("float64", T.float64(0))
        with _strided(self.num_experts, self.lane) as e:
            x = let(_key_to_float(let(self._keys[base + e])))
            assign(total, total + numerics.exp_float64(cast(x, "float64") - maximum))
        assign(total, T.cuda.warp_sum(total))
        with _strided(self.num_experts, self.lane) as e:
            x = let(_key_to_float(let(self._keys[base + e])))
            p = let(cast(numerics.exp_float64(cast(x, "float64") - maximum) / total, "float32"))
            I.buffer_store(self._keys, numerics.sortable_key(p), [base + e])
        cuda.warp_sync()

    def _open_groups(self, base) -> None:
        """DeepSeekV3: the topk_group groups with the largest sum of two are open, ties to the lower id."""
        self._rate_groups(base)
        cuda.warp_sync()
        with _strided(self.n_group, self.lane) as g:
            mine, rank = let(self._group_keys[base + g]), scalar("int32", T.int32(0))
            with for_((self.n_group + BATCH - 1) // BATCH) as batch:
                others = [let(batch * BATCH + i) for i in range(BATCH)]
                keys = [let(self._group_keys[base + T.min(other, self.n_group - 1)]) for other in others]
                for other, key in zip(others, keys, strict=True):
                    is_better = T.Or(key > mine, T.And(key == mine, other < g))
                    assign(rank, rank + cast(T.And(is_better, other < self.n_group), "int32"))
            I.buffer_store(self._is_open, cast(rank < cast(self.a.topk_group, "int32"), "uint8"), [base + g])
        cuda.warp_sync()

    def _rate_groups(self, base) -> None:
        """Key of the sum of two of every group; 32 / n_group lanes, as a power of two, share a group."""
        size = let(self.num_experts // self.n_group)
        shift = scalar("int32", T.int32(0))
        for lanes in (2, 4, 8, 16):
            assign(shift, shift + cast(self.n_group * lanes <= 32, "int32"))
        part, parts = let(self.lane & ((1 << shift) - 1)), let(T.int32(1) << shift)
        at_once = let(T.int32(32) >> shift)
        with for_((self.n_group + at_once - 1) // at_once) as block:
            g = let(block * at_once + (self.lane >> shift))
            start = let(base + T.min(g, self.n_group - 1) * size)
            first = scalar("int32", T.int32(LOWEST))
            second = scalar("int32", first)

            def take(key, first=first, second=second):
                assign(second, T.max(second, T.min(first, key)))
                assign(first, T.max(first, key))

            with for_((size + parts * BATCH - 1) // (parts * BATCH)) as batch:
                offsets = [let((batch * BATCH + i) * parts + part) for i in range(BATCH)]
                keys = [let(self._keys[start + T.min(offset, size - 1)]) for offset in offsets]
                for offset, key in zip(offsets, keys, strict=True):
                    with if_(offset < size):
                        take(key)
            for distance in (1, 2, 4, 8):
                with if_(parts > distance):
                    theirs = [shuffle_xor(key, distance) for key in (first, second)]
                    for key in theirs:
                        take(key)
            with if_(T.And(part == 0, g < self.n_group)):
                total = let(_key_to_float(first) + _key_to_float(second))
                I.buffer_store(self._group_keys, numerics.sortable_key(total), [base + g])

    def _select(self, base, slots, per_lane: int, share) -> None:
        keys, own = regs(per_lane, "int32"), [let(self.lane * per_lane + i) for i in range(per_lane)]
        for i, e in enumerate(own):
            key = let(self._keys[base + T.min(e, self.num_experts - 1)])
            store(keys, T.Select(e < self.num_experts, key, T.int32(CLOSED)), i)
        with if_(self.is_grouped):
            # e // size for e, size <= 1024 by one multiplication
            reciprocal = let(((1 << 20) + self.num_experts // self.n_group - 1) // (self.num_experts // self.n_group))
            groups = [let(T.min(e, self.num_experts - 1) * reciprocal >> 20) for e in own]
            is_open = [let(self._is_open[base + g], "uint8") for g in groups]
            for i in range(per_lane):
                store(keys, T.Select(is_open[i] != T.uint8(0), keys[i], T.int32(CLOSED)), i)
        best, position = (let(value) for value in _best([keys[i] for i in range(per_lane)]))
        for i in range(per_lane):  # ``keys`` holds those behind the lane's best
            store(keys, T.Select(position == i, T.int32(CLOSED), keys[i]), i)
        lower_lanes = let((u32(1) << cast(self.lane, "uint32")) - u32(1))
        with for_(self.top_k) as k:
            key = let(warp_max_s32(best))
            second, second_position = _best([keys[i] for i in range(per_lane)])  # while the maximum is under way
            holders = let(T.cuda.ballot_sync(u32(0xFFFFFFFF), cast(best == key, "int32")), "uint32")
            is_owner = T.And(best == key, (holders & lower_lanes) == u32(0))
            with if_(is_owner):
                none_left = bits(key) == u32(1 << 31)  # TVM folds a comparison with the least int32 to false
                chosen = T.Select(none_left, self.num_experts - 1, self.lane * per_lane + position)
                I.buffer_store(self._chosen, chosen, [slots + k])
            with if_(T.Or(self.lane == k, k == 0)):
                assign(share, _key_to_float(key))
            closed = let(T.Select(is_owner, second_position, T.int32(-1)))
            assign(position, T.Select(closed >= 0, second_position, position))
            assign(best, T.Select(closed >= 0, second, best))
            for i in range(per_lane):
                store(keys, T.Select(closed == i, T.int32(CLOSED), keys[i]), i)

    def score(self, token, expert):
        """What :meth:`weigh` wants to know of an expert."""
        return let(self._scores[token * self.num_experts + expert])

    def weigh(self, score, share):
        """bfloat16 bits of the weight of slot ``lane``, as :meth:`choose` returned it."""
        tiny = T.reinterpret("float64", T.uint64(TINY))
        a = self.a
        is_softmax = self.is_method(Method.Renormalize, Method.RenormalizeNaive)
        weight, term = let(score), scalar("float64", T.float64(0))
        with if_(self.is_method(Method.Default)):
            assign(weight, share)
        with if_(self.is_method(Method.Llama4, Method.TopKSigmoid)):
            assign(weight, numerics.sigmoid_exact(score))
        with if_(is_softmax):
            top = shuffle(score, T.int32(0))
            assign(term, numerics.exp_float64(cast(score, "float64") - cast(top, "float64")))
        with if_(self.uses_sigmoid):
            assign(term, cast(score, "float64"))
        total = let(T.cuda.warp_sum(T.Select(self.lane < self.top_k, term, T.float64(0))))
        with if_(is_softmax):
            assign(weight, cast(term / total, "float32"))
        with if_(T.And(self.is_method(Method.SigmoidRenorm), a.norm_topk_prob != 0)):
            # Not T.max, which would replace NaN.
            assign(weight, cast(term / T.Select(total < tiny, tiny, total), "float32"))
        with if_(self.is_method(Method.DeepSeekV3, Method.MiniMax2)):
            assign(weight, cast(term * a.routed_scaling_factor / (total + tiny), "float32"))
        return let(numerics.float32_to_bf16(weight))

    def write(self, token, expert, weight) -> None:
        """The results of slot ``lane``."""
        a = self.a
        with if_(self.lane < self.top_k):
            slot = let(cast(self.first + token, "int64") * a.top_k + cast(self.lane, "int64"))
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


def route(a) -> None:
    """Emit the kernel."""
    several = T.min(T.int64(WARPS), ENTRIES // a.num_experts)
    per_cta = T.max(T.min((a.num_tokens + (ONE_WAVE - 1)) // ONE_WAVE, several), T.int64(1))
    with kernel("route", cast((a.num_tokens + per_cta - 1) // per_cta, "int32"), THREADS) as thread:
        smem = Smem()
        router = Router(a, smem, WARPS)
        smem.commit()
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()
        first = let(thread.cta * cast(per_cta, "int32"))
        router.begin(thread, first, let(T.min(cast(per_cta, "int32"), cast(a.num_tokens, "int32") - first)))
        router.write_keys()
        cuda.cta_sync()
        with if_(thread.warp < router.num_tokens):
            expert, share = router.choose(thread.warp)
            router.write(thread.warp, expert, router.weigh(router.score(thread.warp, expert), share))
