"""Operations in NumPy on a device of their own, a thread that works behind the host, with a fault planted in them.

`FAULTS` names the faults; NANOGPT_MAC_TEST_FAULT chooses one where the back end is registered in a child process.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nanogpt_mac.backends.arrays import Arrays, Op
from nanogpt_mac.backends.base import Kind
from nanogpt_mac.records.capabilities import Capabilities

HERE = Capabilities("cpu", "numpy", compiles=False)
KIND = Kind("faulty", f"{__name__}:Training", "Faulty", "numpy", (HERE,), arrays=f"{__name__}:FaultyArrays")
VARIABLE = "NANOGPT_MAC_TEST_FAULT"
CHECKED = 4  # calls that are looked at before anything is timed, or a few more


class Training:
    """In the place of a back end that trains: nothing here does."""

    @classmethod
    def device_of(cls, kind):
        return "cpu"


class Native:
    """An array that the device may still be computing."""

    def __init__(self, future):
        self.future = future

    @property
    def value(self):
        return self.future.result()


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def scatter(into, index, values):
    made = into.copy()
    made[index] = values
    return made


FUNCTIONS = {
    "concat": lambda a, b, axis: np.concatenate([a, b], axis),
    "matmul": np.matmul,
    "relu": lambda x: np.maximum(x, 0),
    "scatter": scatter,
    "softmax": softmax,
    "sort": np.sort,
    "sum": lambda x, axis: x.sum(axis),
}


class FaultyArrays(Arrays):
    def __init__(self, kind=KIND, device="cpu", compiled=False, fault=None):
        self.fault = os.environ.get(VARIABLE) if fault is None else fault
        self.device = ThreadPoolExecutor(1)
        self.calls, self.first, self.previous, self.known = 0, None, None, {}

    def put(self, array, dtype=None):
        return Native(self.device.submit(np.array, array, dtype))

    def get(self, array):
        return array.value.copy()

    def dtype(self, array):
        return str(array.value.dtype)

    def start(self, outputs):
        pass

    def wait(self, outputs):
        if self.fault != "the clock is read without waiting":
            self.device.submit(int).result()

    def peek(self, array):
        return float(array.value[(0,) * array.value.ndim])

    def op(self, name):
        return Op(self._faulty(FUNCTIONS[name], name)) if name in FUNCTIONS else None

    def ready(self, function):
        return function

    def ready_with_gradient(self, function, of):
        raise NotImplementedError("VJP not implemented")

    def release(self):
        self.known.clear()

    def _faulty(self, function, name):
        def call(*inputs, **settings):
            self.calls += 1
            fault = self.fault
            if fault == "a crash" and name == "softmax":
                os.abort()
            if fault == "no memory" and name == "softmax":
                raise MemoryError("failed to allocate 1 TB")
            if fault == "a no-op":
                return inputs[0]
            if fault == "a no-op once it is timed" and self.calls > CHECKED:
                return self.previous
            if fault == "a cached result" and self.first is not None:
                return self.first
            if fault == "a result kept for inputs that come again" and id(inputs[0]) in self.known:
                return self.known[id(inputs[0])][1]
            if fault == "an axis that is ignored" and "axis" in settings:
                settings["axis"] = -1 if name == "sort" else None if name == "sum" else (0, 1)
            made = Native(self.device.submit(self._compute, function, inputs, settings, name))
            self.first = self.first or made
            self.previous = made
            if fault == "a result kept for inputs that come again":
                self.known[id(inputs[0])] = inputs[0], made  # kept alive: another would get its id
            return made

        return call

    def _compute(self, function, inputs, settings, name):
        result = function(*(i.value for i in inputs), **settings)
        if self.fault == "a wrong result":
            result = result.copy()
            result.reshape(-1)[result.size // 2] += 1e-3 * (1 + abs(result.reshape(-1)[result.size // 2]))
        if self.fault == "an input that is written over":
            inputs[0].value[...] = result if name == "relu" else 0
        if self.fault == "a result in double precision":
            return result.astype(np.float64)
        if self.fault == "a result thrown away":
            return inputs[0].value if name == "scatter" else np.zeros_like(result)
        if self.fault == "the clock is read without waiting":
            time.sleep(0.0003)
        if self.fault == "a result kept for inputs that come again":
            time.sleep(0.0005)
        return result


FAULTS = (  # and what the refusal says
    ("a wrong result", "wrong result: .* in place of"),
    ("an input that is written over", "it writes into its input 1|wrong result of"),
    ("a result in double precision", "wrong result: it is float64, not float32"),
    ("a result thrown away", "wrong result: nothing was computed, or it was thrown away"),
    ("a no-op", "wrong result"),
    ("a no-op once it is timed", "cached|faster than the memory"),
    ("an axis that is ignored", "axis ignored|wrong result"),
    ("a cached result", "wrong result of the last timed call: cached"),
    ("a result kept for inputs that come again", "a cached result: a call takes|faster than the memory"),
    ("the clock is read without waiting", "the clock was read without waiting"),
)
