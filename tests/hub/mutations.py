"""Files that lie, drawn by hypothesis: a well-formed file with a few values, keys or bytes of it replaced."""

import copy
import json

from hypothesis import strategies as st


SECRET = "../sentinel/secret"  # beside the folder that is read: nothing may follow it
TEXTS = (
    "", "x", "0", "-1", "1e400", "float16", "load", "linear_attention", "deltanet", "llama", "delta_net", "F4",
    f"{SECRET}.json", f"{SECRET}.safetensors", "/etc/passwd", "~/x", ".", "..", "a/../b", "a/b--c.D",
    "../../x--mod.Class",
    "me/base", "config.json", "model.safetensors", "nul\0", "\ud800", "\u2028", "x" * 5000,
    "a\nlicense: mit", "a\n---\nlicense: mit\n---\n", "---", "\n## Limits\n\nnone", "a: b", "- a",
    "!!python/name:os.system",
    "&a *a", "'\"", "{{ 7 * 7 }}", "{% for x in y %}", "<script>alert(1)</script>", "<!--", "-->", "| a | b |",
    "`x` ```",
    "[a](javascript:x)", "![x](y)", "\\", "\r", "\t", "# x", "%s", "{0.__class__}",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.5, 1e-30, 1e308, -1e308, float("nan"),
           float("inf"), float("-inf"))  # fmt: skip


def _nested(depth: int) -> list:
    value = []
    for _ in range(depth):
        value = [value]
    return value


LEAVES = st.one_of(
    st.sampled_from((None, True, False)), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.text(max_size=8)
)
VALUES = st.one_of(
    LEAVES,
    st.sampled_from(
        ([], {}, [[]], _nested(60), {"": {}}, {"a": {"b": [1]}}, [None], [1, "a", {}], {"x": float("nan")})
    ),
    st.lists(LEAVES, max_size=3),
    st.dictionaries(st.sampled_from(TEXTS), LEAVES, max_size=2),
)


def paths(value, prefix=()) -> list[tuple]:
    """Where values stand in a JSON value: the keys and positions that lead there, outermost first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix] + [path for key, x in items for path in paths(x, (*prefix, key))]


DUPLICATE = "\0duplicate"


@st.composite
def json_texts(draw, content: dict, extra_keys: tuple[str, ...] = ()) -> bytes:
    """`content` with one to three edits, as the text of a file: values, missing, extra and doubled keys, or bytes."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.sampled_from((0, 1, 1, 1, 1, 2, 3)))):
        *way, key = draw(st.sampled_from(paths(content)[1:] or [(None,)]))
        if key is None:
            break
        holder = content
        for step in way:
            holder = holder[step]
        edit = draw(st.sampled_from(("replace", "replace", "replace", "wrap", "remove", "add", "double", "number")))
        if edit == "replace":
            holder[key] = copy.deepcopy(draw(VALUES))
        elif edit == "wrap":
            holder[key] = draw(st.sampled_from(([holder[key]], {"x": holder[key]}, str(holder[key]))))
        elif edit == "remove":
            del holder[key]
        elif edit == "number":
            holder[key] = draw(st.one_of(st.integers(), st.floats(), st.sampled_from(NUMBERS)))
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(draw(VALUES)))
        elif edit == "add":
            holder[draw(st.one_of(st.sampled_from(("extra", *extra_keys)), st.sampled_from(TEXTS)))] = copy.deepcopy(
                draw(VALUES)
            )
        else:
            holder[f"{key}{DUPLICATE}"] = copy.deepcopy(draw(VALUES))
    text = json.dumps(content, indent=draw(st.sampled_from((None, 2)))).replace(json.dumps(DUPLICATE)[1:-1], "")
    return draw(damaged(text.encode()))


@st.composite
def damaged(draw, content: bytes, up_to: int | None = None) -> bytes:
    """`content` as it is, mostly; otherwise cut, with bytes of its first `up_to` flipped, or with others put in."""
    up_to = len(content) if up_to is None else up_to
    what = draw(st.sampled_from(("whole",) * 7 + ("cut", "flip", "insert")))
    if what == "whole" or not up_to:
        return content
    if what == "cut":
        return content[: draw(st.integers(0, len(content)))]
    position = draw(st.integers(0, up_to - 1))
    if what == "insert":
        new = draw(
            st.sampled_from(
                (b"\xff", b"\0", b"\xef\xbb\xbf", b"[" * 100_000, b'{"a":' * 5000, b"\n", b"NaN", b"9" * 5000)
            )
        )
        return content[:position] + new + content[position:]
    flipped = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        flipped[(position + draw(st.integers(0, 40))) % up_to] ^= 1 << draw(st.integers(0, 7))
    return bytes(flipped)


@st.composite
def safetensors(draw, content: bytes, flip_data: bool = False) -> bytes:
    """A safetensors file with another header, or with other bytes in it (or in its data, with `flip_data`)."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    text = draw(json_texts(header, extra_keys=("__metadata__", "4.keys")))
    length = draw(
        st.sampled_from((len(text),) * 8 + (0, 1, max(len(text), 1) - 1, len(text) + 8, 2**31, 2**63, 2**64 - 1))
    )
    return draw(damaged(length.to_bytes(8, "little") + text + data, None if flip_data else 8 + len(text)))
