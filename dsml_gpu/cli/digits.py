"""The demo's model: a small network that reads handwritten digits, and its training step, in numpy float64.

Everything is a pure function of flat parameter vectors, because a flat vector is what an all-reduce takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

PIXELS, HIDDEN, DIGITS = 64, 64, 10
#: Weights and biases of the hidden and of the output layer, in their order in the flat vector.
_SHAPES = ((PIXELS, HIDDEN), (HIDDEN,), (HIDDEN, DIGITS), (DIGITS,))
_SIZES = tuple(int(np.prod(shape)) for shape in _SHAPES)
#: Length of the flat vector.
PARAMETERS = sum(_SIZES)

#: Digits kept from training, to test on.
HELD_OUT = 360
BATCH_SIZE = 64
LEARNING_RATE = 0.2
MOMENTUM = 0.9
#: Makes every run the same: the split, the first weights, and the order of examples.
_SEED = 0


@dataclass(frozen=True, slots=True)
class Examples:
    """Digits and what they are.

    Attributes:
        images: one row of `PIXELS` brightnesses from 0 to 1 for each digit.
        labels: the digits, 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: np.ndarray | slice) -> Examples:
        return Examples(self.images[indices], self.labels[indices])


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of the model in training.

    Attributes:
        parameters: flat vector of `PARAMETERS` float64.
        velocity: the momentum's running sum of gradients, of the same shape.
    """

    parameters: np.ndarray
    velocity: np.ndarray

    def updated(self, gradient: np.ndarray) -> Replica:
        """The replica after one step of stochastic gradient descent with momentum."""
        velocity = MOMENTUM * self.velocity + gradient
        return Replica(self.parameters - LEARNING_RATE * velocity, velocity)


def load() -> tuple[Examples, Examples]:
    """The digits that scikit-learn brings along, shuffled: those to train on and those to test on.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    examples = Examples(images / 16.0, labels)[np.random.default_rng(_SEED).permutation(len(labels))]
    return examples[HELD_OUT:], examples[:HELD_OUT]


def initial() -> Replica:
    """An untrained model: normal weights scaled by the number of inputs, zero biases."""
    rng = np.random.default_rng(_SEED)
    layers = [rng.standard_normal(shape) / np.sqrt(shape[0]) if len(shape) == 2 else np.zeros(shape) for shape in _SHAPES]
    return Replica(np.concatenate([layer.reshape(-1) for layer in layers]), np.zeros(PARAMETERS))


def batches(examples: Examples, epoch: int) -> Iterator[Examples]:
    """All examples once, in the epoch's own random order, `BATCH_SIZE` at a time; the last batch may be smaller."""
    order = np.random.default_rng((_SEED, epoch)).permutation(len(examples))
    for start in range(0, len(order), BATCH_SIZE):
        yield examples[order[start : start + BATCH_SIZE]]


def batches_per_epoch(examples: Examples) -> int:
    """How many batches `batches` yields."""
    return -(-len(examples) // BATCH_SIZE)


def shard(batch: Examples, worker: int, workers: int) -> Examples:
    """One worker's part of a batch: every `workers`-th example. Sizes differ by one at most; 0 may be one."""
    return batch[slice(worker, None, workers)]


def gradient(parameters: np.ndarray, examples: Examples, divisor: float) -> np.ndarray:
    """Gradient of the summed cross-entropy of `examples`, divided by `divisor`, as a flat vector.

    With ``divisor = len(examples)`` it is that of the mean. A worker divides by ``len(batch) / workers`` instead: then
    the average over workers is the gradient of the batch's mean, also where shards differ in size.
    """
    _, _, output_weights, _ = _layers(parameters)
    hidden, probabilities = _forward(parameters, examples.images)
    at_output = probabilities
    at_output[np.arange(len(examples)), examples.labels] -= 1.0
    at_output /= divisor
    at_hidden = (at_output @ output_weights.T) * (1.0 - hidden**2)
    parts = (examples.images.T @ at_hidden, at_hidden.sum(0), hidden.T @ at_output, at_output.sum(0))
    return np.concatenate([part.reshape(-1) for part in parts])


def loss(parameters: np.ndarray, examples: Examples) -> float:
    """Mean cross-entropy, in nats."""
    _, probabilities = _forward(parameters, examples.images)
    return float(-np.log(probabilities[np.arange(len(examples)), examples.labels]).mean())


def accuracy(parameters: np.ndarray, examples: Examples) -> float:
    """Share of the examples that the model reads right, from 0 to 1."""
    _, probabilities = _forward(parameters, examples.images)
    return float((probabilities.argmax(axis=1) == examples.labels).mean())


def train_alone(examples: Examples, epochs: int) -> Replica:
    """The same training in one process, without servers: every step takes the gradient of the whole batch."""
    replica = initial()
    for epoch in range(epochs):
        for batch in batches(examples, epoch):
            replica = replica.updated(gradient(replica.parameters, batch, len(batch)))
    return replica


def _layers(parameters: np.ndarray) -> list[np.ndarray]:
    parts = np.split(parameters, list(accumulate(_SIZES))[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, _SHAPES, strict=True)]


def _forward(parameters: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations of the hidden layer, and the probability of each digit."""
    hidden_weights, hidden_biases, output_weights, output_biases = _layers(parameters)
    # tanh has no kinks, where rounding could send two equal trainings different ways.
    hidden = np.tanh(images @ hidden_weights + hidden_biases)
    scores = hidden @ output_weights + output_biases
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, exponentials / exponentials.sum(axis=1, keepdims=True)
