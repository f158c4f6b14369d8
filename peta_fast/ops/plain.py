"""The native functions again in plain numpy, bit for bit: what runs where nothing could be compiled.

Same names, arguments and results as csrc/bindings.cpp; `threads` is taken and ignored. Slow: every step of the algebra
is a pass over memory.
"""

from __future__ import annotations

import numpy as np

from peta_fast.buffers import FACTORS, PANEL
from peta_fast.ops import records as r

CHUNK = 1 << 18
"""Elements at once; a multiple of BLOCK."""

RECORD_BYTES = {"piece": r.PIECE.itemsize, "task": r.TASK.itemsize, "rule": r.RULE.itemsize,
                "group": r.GROUP.itemsize, "variant": r.VARIANT.itemsize, "use": r.USE.itemsize,
                "factors": FACTORS.itemsize}  # fmt: skip
F32 = np.float32
ITEM = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 2: np.dtype(np.uint16)}


def _view(address: int, dtype: np.dtype, count: int) -> np.ndarray:
    """`count` items of raw memory as an array, without a copy."""
    if count == 0:
        return np.empty(0, dtype)
    interface = {"data": (int(address), False), "shape": (count,), "typestr": dtype.str, "version": 3}
    return np.asarray(type("Memory", (), {"__array_interface__": interface})())


def _load(address: int, code: int, start: int, count: int) -> np.ndarray:
    if code == r.CODES["FACTORS"]:
        return _formed(_view(address, np.dtype(np.uint8), FACTORS.itemsize).view(FACTORS)[0], start, count)
    item = ITEM[code]
    stored = _view(int(address) + start * item.itemsize, item, count)
    if code == r.CODES["BF16"]:
        return (stored.astype(np.uint32) << 16).view(F32)
    return stored.astype(F32)


def _formed(f, start: int, count: int) -> np.ndarray:
    """Elements of a low-rank product, ranks in ascending order."""
    start, columns, rank = start + int(f["first"]), int(f["columns"]), int(f["rank"])
    if not count:
        return np.empty(0, F32)
    row, last = start // columns, (start + count - 1) // columns + 1
    left = _view(int(f["left"]) + row * rank * 4, np.dtype(F32), (last - row) * rank).reshape(-1, rank)
    panels = -(-columns // PANEL)
    right = _view(int(f["right"]), np.dtype(F32), panels * rank * PANEL).reshape(panels, rank, PANEL)
    right = right.swapaxes(0, 1).reshape(rank, -1)[:, :columns]
    total = np.zeros((last - row, columns), F32)
    for k in range(rank):
        total = _fused(left[:, k : k + 1], right[k], total)
    out = total.reshape(-1)[start - row * columns :][:count]
    return _load(f["origin"], f["origin_dtype"], start, count) + out if f["origin"] else out


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c rounded once to fp32: exact product, sum rounded to odd in fp64, so that rounding again does no harm."""
    product = a.astype(np.float64) * b
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    odd = np.where(error * total < 0, bits - 1, bits + 1)
    inexact = (error < 0) | (error > 0)
    return np.where(inexact & (bits & 1 == 0), odd, bits).view(np.float64).astype(F32)


def form_factors(factors, size: int, out, threads: int = 0) -> None:
    with np.errstate(all="ignore"):
        out[:size] = _formed(factors[0], 0, size)


def _load_any(address: int, code: int, start: int, count: int, flat: int) -> np.ndarray:
    """Masks and weights; `flat` is the index within the tensor, for masks of bits."""
    if code == r.CODES["BITS"]:
        first = flat // 8
        raw = _view(int(address) + first, np.dtype(np.uint8), (flat + count + 7) // 8 - first)
        return np.unpackbits(raw, bitorder="little")[flat - first * 8 :][:count].astype(F32)
    if code == r.CODES["BYTES"]:
        return (_view(int(address) + start, np.dtype(np.uint8), count) != 0).astype(F32)
    return _load(address, code, start, count)


def _store(address: int, code: int, start: int, y: np.ndarray) -> bool:
    """Rounds once, NaN in its one pattern; returns whether anything stored is not finite."""
    item = ITEM[code]
    out = _view(int(address) + start * item.itemsize, item, len(y))
    y = np.where(np.isnan(y), F32(np.nan), y)
    if code == r.CODES["BF16"]:
        u = y.view(np.uint32)
        out[:] = (u + np.uint32(0x7FFF) + (u >> 16 & 1)) >> 16
        return bool(((out & 0x7F80) == 0x7F80).any())
    with np.errstate(over="ignore"):
        out[:] = y.astype(item)
    return not np.isfinite(out).all()


def _magnitude_bits(d: np.ndarray) -> np.ndarray:
    return d.view(np.uint32) & np.uint32(r.ABS_MASK)


def _delta(base_kind: int, base: int, base_code: int, x: np.ndarray, start: int) -> np.ndarray:
    if base_kind == r.BASE_ZERO:
        return x
    return x - (F32(1) if base_kind == r.BASE_ONE else _load(base, base_code, start, len(x)))


def _in_top(a: np.ndarray, threshold: int, last_index: int, first: int) -> np.ndarray:
    index = np.arange(first, first + len(a))
    return (a > threshold) | ((a == threshold) & (index <= last_index))


def _kept(task, a: np.ndarray, start: int, flat: int) -> np.ndarray:
    keep = task["keep"]
    if keep == r.KEEP_ALL:
        return np.ones(len(a), bool)
    if keep == r.KEEP_NONE:
        return np.zeros(len(a), bool)
    if keep == r.KEEP_TOP:
        return _in_top(a, task["low"], task["low_index"], flat)
    if keep == r.KEEP_BAND:
        low, high = (_in_top(a, task[e], task[f"{e}_index"], flat) for e in ("low", "high"))
        return low & ~high
    first = flat // 4 * 4
    words = philox_words(int(task["key"]), first, flat - first + len(a))[flat - first :][: len(a)]
    u = (words >> 8).astype(F32) * F32(2.0**-24)
    if keep == r.KEEP_RANDOM:
        return u < task["p"]
    return u < _view(int(task["probability"]) + start * 4, np.dtype(F32), len(a))


def _contribution(piece, rule, task, start: int, count: int):
    """d, and d sparsified, masked, prescaled; with whether anything was not finite."""
    flat = int(piece["start"]) + start
    x = _load(task["x"], task["dtype"], start, count)
    kind = r.BASE_ZERO if task["is_delta"] else rule["base_kind"]
    d = _delta(kind, piece["base"], piece["base_dtype"], x, start)
    a = _magnitude_bits(d)
    e = np.where(_kept(task, a, start, flat), d, F32(0))
    finite = np.isfinite(d).all()
    if task["mask"]:
        m = _load_any(task["mask"], task["mask_dtype"], start, count, flat)
        e, finite = e * m, finite and np.isfinite(m).all()
    if task["by_probability"]:
        e = e * (F32(1) / _view(int(task["probability"]) + start * 4, np.dtype(F32), count))
    if task["prescale"] != 1:
        e = e * task["prescale"]
    return d, e, not finite


def _weight(task, start: int, count: int) -> tuple[np.ndarray, bool]:
    """The task's weight at every element; with whether anything was not finite."""
    if not task["weights"]:
        return np.full(count, task["weight"], F32), False
    f = _load(task["weights"], task["weights_dtype"], start, count)
    return task["weight"] * f, not np.isfinite(f).all()


def _signs(v: np.ndarray) -> np.ndarray:
    """-1, 0 or 1; NaN has no sign."""
    return (v > 0).astype(F32) - (v < 0).astype(F32)


def _lower_median(values: list[np.ndarray]) -> np.ndarray:
    """By insertion, so that zeros of either sign and NaN go where the native code puts them."""
    ordered: list[np.ndarray] = []
    for v in values:
        for j, other in enumerate(ordered):
            smaller = other > v
            ordered[j], v = np.where(smaller, v, other), np.where(smaller, other, v)
        ordered.append(v)
    return ordered[(len(values) - 1) // 2]


def _merged(piece, rule, tasks, start: int, count: int) -> tuple[np.ndarray, bool]:
    """What is added to the base, by the rule; with whether an input was not finite."""
    minus_zero = np.full(count, -0.0, F32)
    total, positive, negative = minus_zero, minus_zero, minus_zero
    positive_divisor = negative_divisor = np.zeros(count, F32)
    bad, values = False, []
    electing, aggregate = rule["elect"] != r.ELECT_NONE, rule["aggregate"]
    for task in tasks:
        _, e, nonfinite = _contribution(piece, rule, task, start, count)
        w, nonfinite_weight = _weight(task, start, count)
        bad |= nonfinite | nonfinite_weight
        we = e * w
        if not electing:
            if aggregate in (r.LARGEST_FIRST, r.LARGEST_LAST):
                a, best = _magnitude_bits(we), _magnitude_bits(total)
                total = np.where(a >= best if aggregate == r.LARGEST_LAST else a > best, we, total)
            elif aggregate == r.MEDIAN:
                values.append(we)
            else:
                total = total + we
            continue
        v = we if rule["elect"] == r.ELECT_WEIGHTED else e
        up, down = v > 0, v < 0
        total = total + (_signs(v) if rule["elect"] == r.ELECT_COUNT else v)
        if aggregate == r.MAX:
            positive = np.where(up & (we > positive), we, positive)
            negative = np.where(down & (we < negative), we, negative)
            continue
        share = F32(1) if rule["divide"] == r.DIVIDE_AGREEING_COUNT else w
        positive, negative = np.where(up, positive + we, positive), np.where(down, negative + we, negative)
        positive_divisor = np.where(up, positive_divisor + share, positive_divisor)
        negative_divisor = np.where(down, negative_divisor + share, negative_divisor)
    if values:
        total = _lower_median(values)
    if rule["elect"] == r.ELECT_GIVEN:
        total = _load(piece["sign"], piece["sign_dtype"], start, count)
        bad |= not np.isfinite(total).all()
    if electing:
        total = _elected(rule, total, positive, negative, positive_divisor, negative_divisor)
    if rule["divide"] == r.DIVIDE_CONSTANT and rule["divisor"] != 1:
        total = total / rule["divisor"]
    return (total * rule["scaling"] if rule["scaling"] != 1 else total), bad


def _elected(rule, total, positive, negative, positive_divisor, negative_divisor) -> np.ndarray:
    above, below = total > 0, total < 0
    up = ~below if rule["zero_sign"] > 0 else above
    down = ~above if rule["zero_sign"] < 0 else below
    chosen = np.where(up, positive, np.where(down, negative, F32(-0.0)))
    if rule["divide"] == r.DIVIDE_CONSTANT:
        return chosen
    divisor = np.where(up, positive_divisor, negative_divisor)
    if rule["floor"] > 0:
        divisor = np.where(divisor < rule["floor"], rule["floor"], divisor)
    else:
        divisor = np.where(divisor == 0, F32(1), divisor)
    return chosen / divisor


def delta_merge(mode: int, pieces, tasks, rules, threads: int = 0) -> None:
    with np.errstate(all="ignore"):
        for piece in pieces:
            mine = tasks[piece["first_task"] : piece["first_task"] + piece["tasks"]]
            piece["nonfinite"] = piece["sign_total"] = 0
            for start in range(0, int(piece["size"]), CHUNK):
                count = min(CHUNK, int(piece["size"]) - start)
                _MODES[mode](piece, rules[piece["rule"]], mine, start, count)


def merge_variants(groups, terms, variants, uses, rules, threads: int = 0) -> None:
    """Each variant by itself: what they share is made anew for each."""
    for group in groups:
        mine = terms[group["first_term"] :]
        for variant in variants[group["first_variant"] :][: group["variants"]]:
            used = uses[variant["first_use"] :][: variant["uses"]]
            tasks = mine[used["term"]]
            tasks["weight"] = used["weight"]
            piece = np.zeros(1, r.PIECE)
            for name in ("base", "size", "start", "base_dtype"):
                piece[name] = group[name]
            piece["out"], piece["out_dtype"], piece["tasks"] = variant["out"], variant["out_dtype"], len(tasks)
            delta_merge(r.MERGE, piece, tasks, rules[variant["rule"] :])
            variant["nonfinite"] = piece["nonfinite"][0]


def _merge_chunk(piece, rule, tasks, start: int, count: int) -> None:
    y, bad = _merged(piece, rule, tasks, start, count)
    if rule["base_kind"] != r.BASE_ZERO:
        one = rule["base_kind"] == r.BASE_ONE
        base = np.ones(count, F32) if one else _load(piece["base"], piece["base_dtype"], start, count)
        bad |= not np.isfinite(base).all()
        y = np.where(y == 0, base, base + y)
    bad_out = _store(piece["out"], piece["out_dtype"], start, y)
    piece["nonfinite"] |= int(bad) | int(bad_out) << 1


def _norm_chunk(piece, rule, tasks, start: int, count: int) -> None:
    partials = _view(piece["partials"], np.dtype(np.float64), -(-int(piece["size"]) // r.BLOCK) * len(tasks) * 2)
    partials = partials.reshape(-1, len(tasks), 2)
    for t, task in enumerate(tasks):
        d, e, _ = _contribution(piece, rule, task, start, count)
        for which, values in enumerate((d, e)):
            sums = _block_sums(np.abs(values).astype(np.float64))
            partials[start // r.BLOCK :, t, which][: len(sums)] = sums


def _sign_chunk(piece, rule, tasks, start: int, count: int) -> None:
    total = np.full(count, -0.0, F32)
    for task in tasks:
        _, e, _ = _contribution(piece, rule, task, start, count)
        v = e * _weight(task, start, count)[0] if rule["elect"] == r.ELECT_WEIGHTED else e
        total = total + (_signs(v) if rule["elect"] == r.ELECT_COUNT else v)
    piece["sign_total"] += int(_signs(total).sum(dtype=np.float64))


_MODES = {r.MERGE: _merge_chunk, r.KEPT_NORM: _norm_chunk, r.SIGN_TOTAL: _sign_chunk}


def _block_sums(values: np.ndarray) -> np.ndarray:
    """[blocks] sums of 4096 elements each: 32 interleaved lanes, element by element, then halves onto halves."""
    padded = np.zeros(-(-len(values) // r.BLOCK) * r.BLOCK)
    padded[: len(values)] = values
    lanes = np.zeros((len(padded) // r.BLOCK, 32))
    for step in padded.reshape(-1, r.BLOCK // 32, 32).swapaxes(0, 1):
        lanes = lanes + step
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def tree_sum(values: np.ndarray) -> float:
    """Adjacent pairs, padded with zeros to a power of two."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return 0.0
    while len(values) > 1:
        values = np.append(values, 0.0) if len(values) % 2 else values
        values = values[0::2] + values[1::2]
    return float(values[0])


def philox_words(key: int, first: int, count: int) -> np.ndarray:
    counters = np.arange(first // 4, first // 4 + (count + 3) // 4, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    c0, c1 = counters & low, counters >> np.uint64(32)
    c2 = c3 = np.zeros_like(counters)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            p1 >> np.uint64(32) ^ c1 ^ np.uint64(k0), p1 & low, p0 >> np.uint64(32) ^ c3 ^ np.uint64(k1), p0 & low,
        )  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32).reshape(-1)


def _whole_delta(delta, size: int) -> np.ndarray:
    x = _load(delta["x"], delta["dtype"], 0, size)
    with np.errstate(all="ignore"):
        return _delta(
            r.BASE_ZERO if delta["is_delta"] else delta["base_kind"], delta["base"], delta["base_dtype"], x, 0
        )


def select_magnitudes(tasks, queries, threads: int = 0) -> None:
    for task in tasks:
        a = _magnitude_bits(_whole_delta(task["delta"], int(task["size"])))
        ordered = np.sort(a)[::-1]
        for query in queries[task["first_query"] : task["first_query"] + task["queries"]]:
            threshold = ordered[query["count"] - 1]
            equal = np.flatnonzero(a == threshold)
            query["threshold"], query["equal"] = threshold, len(equal)
            query["above"] = np.count_nonzero(a > threshold)
            kept = int(query["count"] - query["above"])
            query["last_index"] = r.LAST if kept == len(equal) else equal[kept - 1]


def magnitude_histogram(delta, size: int, bins, prefix: int, threads: int = 0) -> None:
    a = _magnitude_bits(_whole_delta(delta[0], size))
    if prefix < 0:
        bins += np.bincount(a >> 15, minlength=65536).astype(np.uint64)
    else:
        bins += np.bincount(a[a >> 15 == prefix] & 0x7FFF, minlength=32768).astype(np.uint64)


def ranked_probability(delta, begin_row: int, rows: int, columns: int, low, high, out, threads: int = 0) -> None:
    a = _magnitude_bits(_whole_delta(delta[0], (begin_row + rows) * columns))
    a = a[begin_row * columns :].reshape(rows, columns)
    order = np.argsort(a, axis=1, kind="stable")
    span = high - low
    ranked = np.arange(columns) / np.float64(columns - 1) if columns > 1 else np.full(1, 0.5)
    by_rank = (low + span * np.arange(columns) / (columns - 1)) if columns > 1 else low + span * ranked
    np.put_along_axis(out[: rows * columns].reshape(rows, columns), order, by_rank.astype(F32)[None, :], axis=1)


def task_statistics(deltas, size: int, threads: int = 0) -> dict[str, np.ndarray]:
    count = len(deltas)
    d = [_whole_delta(x, size) for x in deltas]
    wide = [x.astype(np.float64) for x in d]
    pairs = [(s, t) for s in range(count) for t in range(s, count)]
    with np.errstate(all="ignore"):
        sums = [tree_sum(_block_sums(x)) for x in wide] + [tree_sum(_block_sums(np.abs(x))) for x in wide]
        sums += [tree_sum(_block_sums(wide[s] * wide[t])) for s, t in pairs]
    bits = [_magnitude_bits(x) for x in d]
    infinity = r.bits(np.inf)
    opposite = [int(((d[s] > 0) & (d[t] < 0) | (d[s] < 0) & (d[t] > 0)).sum()) for s, t in pairs if s != t]
    up = np.any([x > 0 for x in d], axis=0)
    down = np.any([x < 0 for x in d], axis=0)
    return {
        "sums": np.array(sums),
        "nonfinite": np.array([(b >= infinity).sum() for b in bits], np.int64),
        "nonzero": np.array([(b != 0).sum() for b in bits], np.int64),
        "largest": np.array([b[b <= infinity].max(initial=0) for b in bits], np.uint32),
        "conflicts": np.array(opposite, np.int64),
        "any_conflict": np.array([(up & down).sum()], np.int64),
    }


def copy_bytes(to: int, source: int, count: int, threads: int = 0) -> None:
    byte = np.dtype(np.uint8)
    _view(to, byte, count)[:] = _view(source, byte, count)


CHECKSUM_BLOCK = 1 << 20
P1, P2, P3, P4, P5 = np.array(
    [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5], np.uint64
)


def checksum(source: int, count: int, threads: int = 0) -> int:
    """XXH64 (seed 0) of the XXH64 digests of blocks of 1 MiB, in order."""
    data = _view(source, np.dtype(np.uint8), count)
    whole = count // CHECKSUM_BLOCK * CHECKSUM_BLOCK
    digests = [np.empty(0, np.uint64)]
    if whole:
        digests.append(_xxh64(data[:whole].reshape(-1, CHECKSUM_BLOCK)))
    if count > whole:
        digests.append(_xxh64(data[whole:].reshape(1, -1)))
    return int(_xxh64(np.concatenate(digests).view(np.uint8).reshape(1, -1))[0])


def _rotate(x: np.ndarray, by: int) -> np.ndarray:
    return x << np.uint64(by) | x >> np.uint64(64 - by)


def _round(lane: np.ndarray, word: np.ndarray) -> np.ndarray:
    return _rotate(lane + word * P2, 31) * P1


def _xxh64(rows: np.ndarray) -> np.ndarray:
    """uint64 [rows]: the digest of each row of bytes."""
    count, size = rows.shape
    h = np.full(count, P5)
    striped, aligned = size // 32 * 32, size // 8 * 8
    words = np.ascontiguousarray(rows[:, :aligned]).view(np.uint64)
    if striped:
        lanes = np.tile(np.array([(int(P1) + int(P2)) % 2**64, P2, 0, -int(P1) % 2**64], np.uint64), (count, 1))
        for at in range(0, striped // 8, 4):
            lanes = _round(lanes, words[:, at : at + 4])
        h = sum(_rotate(lanes[:, i], by) for i, by in enumerate((1, 7, 12, 18)))
        for i in range(4):
            h = (h ^ _round(np.uint64(0), lanes[:, i])) * P1 + P4
    h = h + np.uint64(size)
    for at in range(striped // 8, aligned // 8):
        h = _rotate(h ^ _round(np.uint64(0), words[:, at]), 27) * P1 + P4
    at = aligned
    if size - at >= 4:
        h = _rotate(h ^ np.ascontiguousarray(rows[:, at : at + 4]).view(np.uint32)[:, 0] * P1, 23) * P2 + P3
        at += 4
    for place in range(at, size):
        h = _rotate(h ^ rows[:, place] * P5, 11) * P1
    for by, factor in ((33, P2), (29, P3)):
        h = (h ^ h >> np.uint64(by)) * factor
    return h ^ h >> np.uint64(32)


def default_threads() -> int:
    return 1
