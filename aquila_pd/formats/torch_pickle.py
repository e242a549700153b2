"""Restricted unpickler for tensor pickles: interprets opcodes, never imports or calls foreign code.

A pickle is a program. The machine here knows the few operations that torch.save writes and has a plain record for each
of their results: it never calls, imports or looks up anything that the file names. Where the bytes of a tensor lie is
not its business.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pickle import UnpicklingError

from ..utils.errors import shown

# A tensor takes about 30 operations, and 90 bytes beside its name. Without limits a hostile file of a few megabytes
# could take minutes and gigabytes: an empty list is one byte in the file and 64 in memory.
MAX_OPERATIONS = 300_000
MAX_BYTES = 4 * 2**20
LARGEST = 2**62  # of the numbers of a tensor; sums of a few still fit into the 64 bits of an address

UNTYPED = "torch.storage UntypedStorage"
STORAGES = {  # of torch.uint8 are the untyped ones, whose tensors say their dtype themselves
    UNTYPED: "torch.uint8",
    "torch FloatStorage": "torch.float32",
    "torch HalfStorage": "torch.float16",
    "torch BFloat16Storage": "torch.bfloat16",
    "torch DoubleStorage": "torch.float64",
    "torch LongStorage": "torch.int64",
    "torch IntStorage": "torch.int32",
    "torch ShortStorage": "torch.int16",
    "torch CharStorage": "torch.int8",
    "torch ByteStorage": "torch.uint8",
    "torch BoolStorage": "torch.bool",
    "torch ComplexFloatStorage": "torch.complex64",
    "torch ComplexDoubleStorage": "torch.complex128",
    "torch QInt8Storage": "torch.qint8",
    "torch QUInt8Storage": "torch.quint8",
    "torch QInt32Storage": "torch.qint32",
    "torch QUInt4x2Storage": "torch.quint4x2",
    "torch QUInt2x4Storage": "torch.quint2x4",
}
UNSIGNED = ("uint16", "uint32", "uint64")
SMALL = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2")
DTYPES = {*STORAGES.values(), *(f"torch.{name}" for name in (*UNSIGNED, *SMALL, "complex32"))}
LAYOUTS = {f"torch.sparse_{name}" for name in ("coo", "csr", "csc", "bsr", "bsc")}
META = "is on the device meta: it was saved without its values"
NOT_DENSE = "has the layout {}; only dense tensors are read"
UNFINISHED = "was saved with a negation or conjugation still to be done"
QUANTIZERS = ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams")


class WouldRunCode(UnpicklingError):
    """Loading the pickle in the usual way would call what this names."""


@dataclass(frozen=True, slots=True)
class Name:
    """A function or class that torch's files mention, as "module name". It leads to nothing."""

    text: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A torch storage. dtype: "torch.float32"; key: what their entry is called; count: how many they are."""

    dtype: str
    key: str
    count: int
    device: str


@dataclass(frozen=True, slots=True)
class Tensor:
    """A strided view of a storage; offset and strides count elements. trouble: why it cannot be read, else empty."""

    dtype: str
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0
    storage: Storage | None = None
    trouble: str = ""


@dataclass(slots=True)
class Table:
    """A dict or OrderedDict as pairs in order. Nothing is hashed, so keys made to collide cost nothing."""

    kind: str
    pairs: list[tuple[object, object]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Opaque:
    """An object that torch files may hold beside tensors; its content is discarded."""

    kind: str


def kind_of(value: object) -> str:
    """What Python calls the class of an unpickled value."""
    if isinstance(value, Table | Opaque):
        return value.kind
    if isinstance(value, Name):
        return "dtype" if _dotted(value.text) in DTYPES else "type"
    return type(value).__name__


# ----------------------------------------------------------------------- what takes the place of torch's functions
# Their arguments come from the file and may be anything.


def _tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> Tensor:
    if not isinstance(storage, Storage):
        raise UnpicklingError(f"a tensor stands on a {kind_of(storage)}, not on a storage")
    shape, strides = _whole_numbers(shape), _whole_numbers(strides)
    (offset,) = _whole_numbers((offset,))
    if len(shape) != len(strides):
        raise UnpicklingError(f"a tensor of {len(shape)} dimensions has {len(strides)} strides")
    trouble = ""
    if storage.device == "meta":
        trouble = META
    elif isinstance(metadata, Table) and metadata.pairs:
        trouble = UNFINISHED
    return Tensor(storage.dtype, shape, strides, offset, storage, trouble)


def _tensor_with_dtype(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None) -> Tensor:
    tensor = _tensor(storage, offset, shape, strides, requires_grad, hooks, metadata)
    if tensor.dtype != STORAGES[UNTYPED]:
        raise UnpicklingError(f"a tensor of {kind_of(dtype)} stands on a storage of {tensor.dtype}")
    return replace(tensor, dtype=_dtype(dtype))


def _quantized(storage, offset, shape, strides, quantizer, requires_grad, hooks) -> Tensor:
    return _tensor(storage, offset, shape, strides)


def _meta(dtype, shape, strides, requires_grad) -> Tensor:
    return Tensor(_dtype(dtype), _whole_numbers(shape), trouble=META)


def _sparse(layout, data) -> Tensor:
    return Tensor("", trouble=NOT_DENSE.format(_layout(layout)))


def _nested(*parts) -> Tensor:
    return Tensor("", trouble="is a nested tensor; only dense tensors are read")


def _parameter(tensor, requires_grad, hooks, state=None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise UnpicklingError(f"a parameter is made of a {kind_of(tensor)}, not of a tensor")
    return tensor


def _with_attributes(function, kind, arguments, state) -> Tensor:
    """A tensor that Python attributes were given to, a buffer for example."""
    build = TENSORS.get(function.text) if isinstance(function, Name) else None  # this function is not among them
    if build is None or type(arguments) is not tuple:
        raise UnpicklingError("a tensor with attributes is not made as torch makes one")
    return build(*arguments)


def _layout(text) -> str:
    if type(text) is not str or text not in LAYOUTS:
        raise UnpicklingError("a tensor has a layout that torch does not know")
    return text


def _dtype(name) -> str:
    if not isinstance(name, Name) or _dotted(name.text) not in DTYPES:
        raise UnpicklingError(f"a tensor has a {kind_of(name)} where its dtype was due")
    return _dotted(name.text)


def _whole_numbers(numbers) -> tuple[int, ...]:
    if type(numbers) is not tuple or not all(type(n) is int and 0 <= n < LARGEST for n in numbers):
        raise UnpicklingError("a tensor's shape, strides or offset are not whole numbers of a sensible size")
    return numbers


def _opaque(kind: str) -> Callable[..., Opaque]:
    return lambda *arguments: Opaque(kind)


def _dotted(text: str) -> str:
    return text.replace(" ", ".", 1)


TENSORS: dict[str, Callable[..., Tensor]] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch._utils _rebuild_qtensor": _quantized,
    "torch._utils _rebuild_meta_tensor_no_storage": _meta,
    "torch._utils _rebuild_sparse_tensor": _sparse,
    "torch._utils _rebuild_nested_tensor": _nested,
}
FUNCTIONS: dict[str, Callable[..., object]] = {
    **TENSORS,
    "torch._tensor _rebuild_from_type_v2": _with_attributes,
    "torch.serialization _get_layout": _layout,
    "collections OrderedDict": lambda: Table("OrderedDict"),
    # beside tensors, or inside what is passed over
    "torch Size": _opaque("Size"),
    "torch device": _opaque("device"),
    "_codecs encode": _opaque("bytes"),
    **{f"{module} set": _opaque("set") for module in ("builtins", "__builtin__")},
}
MENTIONED = {
    *STORAGES,
    *(dtype.replace(".", " ") for dtype in DTYPES),
    *(f"torch {name}" for name in QUANTIZERS),
    "torch Tensor",
    "torch.nn.parameter Parameter",
    "torch.nn.parameter Buffer",
}

# ------------------------------------------------------------------------------------------------- the machine


class _Machine:
    """A stack, where its marked parts begin, and values to come back to by number."""

    def __init__(self):
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}  # a list would be as long as the largest number in the file

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self, _) -> None:
        self.marks.append(len(self.stack))

    def pop_marked(self) -> list[object]:
        begin = self.marks.pop()
        values = self.stack[begin:]
        del self.stack[begin:]
        return values

    def remember(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def remember_next(self, _) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def recall(self, number: int) -> None:
        self.push(self.memo[number])

    def make_tuple(self, length: int) -> None:
        values = tuple(self.stack.pop() for _ in range(length))
        self.push(values[::-1])

    def make_marked_tuple(self, _) -> None:
        self.push(tuple(self.pop_marked()))

    def extend(self, values: list[object]) -> None:
        """Appending to an opaque object is ignored."""
        target = self.stack[-1]
        if type(target) is list:
            target.extend(values)
        elif not isinstance(target, Opaque):
            raise UnpicklingError(f"something is appended to a {kind_of(target)}")

    def set_items(self, values: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, Table):
            raise UnpicklingError(f"keys are set in a {kind_of(target)}")
        target.pairs.extend(zip(values[::2], values[1::2], strict=True))

    def set_item(self, _) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def build(self, _) -> None:
        """Attributes, such as the _metadata of a state_dict, are ignored."""
        self.stack.pop()
        if not isinstance(self.stack[-1], Table | Tensor | Opaque):
            raise UnpicklingError(f"attributes are given to a {kind_of(self.stack[-1])}")

    def name(self, text: str) -> None:
        if text not in FUNCTIONS and text not in MENTIONED:
            raise WouldRunCode(shown(_dotted(text)))
        self.push(Name(text))

    def name_on_stack(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise UnpicklingError("a name is not text")
        self.name(f"{module} {name}")

    def call(self, _) -> None:
        """The only place where something is called: our own function from the table, under the name on the stack."""
        arguments, target = self.stack.pop(), self.stack.pop()
        function = FUNCTIONS.get(target.text) if isinstance(target, Name) else None
        if function is None or type(arguments) is not tuple:
            raise UnpicklingError(f"a {kind_of(target)} is called")
        self.push(function(*arguments))

    def instantiate(self, text: str) -> None:
        raise WouldRunCode(shown(_dotted(text)))

    def extension(self, code: int) -> None:
        raise WouldRunCode(f"pickle extension {code}")

    def storage(self, _) -> None:
        identity = self.stack.pop()
        if type(identity) is not tuple or [type(part) for part in identity] != [str, Name, str, str, int]:
            raise UnpicklingError("a storage is not described as torch describes one")
        tag, kind, key, device, count = identity
        if tag != "storage" or kind.text not in STORAGES or not 0 <= count < LARGEST:
            raise UnpicklingError("a storage is not described as torch describes one")
        self.push(Storage(STORAGES[kind.text], key, count, device))


OPERATIONS: dict[str, Callable[[_Machine, object], None]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _Machine.push),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine.extension),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push(Table("dict")),
    "MARK": _Machine.mark,
    "MEMOIZE": _Machine.remember_next,
    "TUPLE": _Machine.make_marked_tuple,
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_marked()),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_marked()),
    "BUILD": _Machine.build,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "INST": _Machine.instantiate,
    "REDUCE": _Machine.call,
    "BINPERSID": _Machine.storage,
}


def read_pickle(content: bytes) -> object:
    """The value a pickle of tensors describes, in the records above.

    Raises WouldRunCode for one that names anything else, UnpicklingError for one that is damaged, hostile or too large.
    """
    if len(content) > MAX_BYTES:
        raise UnpicklingError(f"its list of tensors takes more than {MAX_BYTES:,} bytes")
    machine = _Machine()
    try:
        for done, (operation, argument, _) in enumerate(pickletools.genops(content)):
            if done == MAX_OPERATIONS:
                raise UnpicklingError(f"its list of tensors takes more than {MAX_OPERATIONS:,} operations")
            step = OPERATIONS.get(operation.name)
            if step is None:
                raise UnpicklingError(f"the operation {operation.name} is none that lists of tensors are made with")
            step(machine, argument)
        (value,) = machine.stack
        return value
    except UnpicklingError:
        raise
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UnpicklingError(f"{type(error).__name__}: {error}") from error
