"""The training loops that ``benchmarks.speed.training`` measures: the workshop's loops and Quartet's loops.

Each loop is an endless generator. In each iteration, it trains for one step, and yields the number of samples in this
step. A sample is an image (for the GAN, a real image), or a window of a sequence with its next character or value. The
workshop's loops follow the code of the workshop, with corrections. They use the workshop's batch sizes, optimisers and
losses, a data loader without worker processes, and a new window for every sample. Quartet's loops run the training
steps of ``training/`` with the workshop presets. Both kinds of loops use the same data, and networks of the same sizes.
They leave out progress bars, validation, pictures of samples and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from app.networks import build
from app.networks.gan import Discriminator, Generator, GeneratorSizes
from app.networks.lstm import SeriesLSTM, SeriesLSTMSizes
from app.networks.rnn import CharacterRNN, CharacterRNNSizes
from training import cnn, lstm, rnn
from training.configs.classifiers import CnnConfig
from training.configs.generators import GanConfig
from training.configs.series import LstmConfig
from training.data import datasets, texts
from training.loops.classifier import AveragedTrainer, ClassifierRecipe
from training.loops.fit import Batches, Recipe
from training.loops.gan import GanRecipe, workshop_trainer
from training.loops.text import language_model
from training.run import derive_seed

Loop = Iterator[int]  # the number of samples in each step

SEED = 0
RNN_WINDOW = 30  # as in the workshop
LSTM_WINDOW = 50
LSTM = LstmConfig()
LSTM_READ = LSTM.window + LSTM.horizon - 1  # number of values that Quartet's loop reads for a window


@dataclass(frozen=True)
class Side:
    """One training loop. ``values_read`` is the number of values that the loop reads from the data for each sample.

    ``limit`` says which operations take most of the time. This was measured with a profiler on one core with AVX-512.
    """

    loop: Callable[[], Loop]
    limit: str
    values_read: float = 1


@dataclass(frozen=True)
class Pair:
    samples: str
    workshop: Side
    ours: Side
    unit: str = ""  # unit of the values read, if they are not samples


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images as in torchvision's data sets. Each access converts an array to a PIL image, and then transforms it."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.arrays = images.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()  # [N, S, S, 3] or [N, S, S]
        self.labels = labels.tolist()
        half = (0.5,) * images.shape[1]
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(half, half)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def workshop_lenet() -> nn.Module:
    """Return the layers of ``LeNet`` for pixels that the loader has scaled."""
    first = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(
        *first, *second, nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
    )


def steps(total: int) -> Iterator[int]:
    """Yield the numbers of the steps, again and again. As in ``Run.steps``, each step sets its own random seed."""
    while True:
        for step in range(total):
            torch.manual_seed(derive_seed(SEED, "step", step))
            yield step


def loop_of(recipe: Recipe, total: int, samples: int) -> Loop:
    """Return the loop of a recipe with ``total`` steps of ``samples`` samples each."""
    for step in steps(total):
        recipe.update(step, (step + 1) / total)
        yield samples


def workshop_cnn() -> Loop:
    images = datasets.cifar10()
    training, _ = images.split_validation(CnnConfig().validation)
    dataset = ImageDataset(images.train_images[training], images.train_labels[training])
    loader = DataLoader(dataset, batch_size=64, shuffle=True)
    network = workshop_lenet()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    running_loss = 0.0
    while True:
        for x, labels in loader:
            optimizer.zero_grad()
            loss = criterion(network(x), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            yield len(labels)


def our_cnn() -> Loop:
    config = CnnConfig()
    images = datasets.cifar10()
    training, validation = images.split_validation(config.validation)
    network = build(config.kind, asdict(cnn.SIZES[config.kind]()))
    batches = Batches(training, config.batch, SEED)
    recipe = ClassifierRecipe(
        AveragedTrainer(config, network), images.train_images, images.train_labels, batches, validation
    )
    return loop_of(recipe, config.epochs * batches.per_epoch, config.batch)


def workshop_gan() -> Loop:
    images = datasets.mnist()
    loader = DataLoader(ImageDataset(images.train_images, images.train_labels), batch_size=64, shuffle=True)
    generator, discriminator = Generator(GeneratorSizes()), Discriminator()
    criterion = nn.BCELoss()
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-4)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-4)
    while True:
        for real, _ in loader:
            ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
            discriminator_optimizer.zero_grad()
            fake = generator(torch.randn(len(real), 100))
            real_scores, fake_scores = discriminator(real).sigmoid(), discriminator(fake.detach()).sigmoid()
            d_loss = criterion(real_scores, ones) + criterion(fake_scores, zeros)
            d_loss.backward()
            discriminator_optimizer.step()

            generator_optimizer.zero_grad()
            g_loss = criterion(discriminator(fake).sigmoid(), ones)
            g_loss.backward()
            generator_optimizer.step()
            yield len(real)


def our_gan() -> Loop:
    config = GanConfig()
    recipe = GanRecipe(workshop_trainer(config, "cpu"), datasets.mnist().train_images, None, SEED, Path())
    return loop_of(recipe, config.epochs * recipe.batches.per_epoch, config.batch)


def shakespeare() -> tuple[Tensor, int]:
    """Return the training characters [T] and the size of the vocabulary."""
    text = datasets.tinyshakespeare()
    vocabulary = texts.vocabulary_of(text.train)
    characters = texts.encode(text.train, vocabulary)
    return characters, len(vocabulary)


def workshop_rnn() -> Loop:
    training, vocabulary_size = shakespeare()
    network = CharacterRNN(CharacterRNNSizes(vocabulary_size))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    while True:
        for start in range(len(training) - RNN_WINDOW):
            window, target = training[start : start + RNN_WINDOW], training[start + RNN_WINDOW]
            optimizer.zero_grad()
            outputs, _ = network.rnn(network.embedding(window.unsqueeze(0)))  # [1, 30, 128]
            loss = criterion(network.head(outputs[:, -1]), target.unsqueeze(0).long())
            loss.backward()
            optimizer.step()
            yield 1


def our_rnn() -> Loop:
    options, config = rnn.arguments(["--threads", "1", "--seed", str(SEED)])
    training, vocabulary_size = shakespeare()
    network = language_model.new_network(config, vocabulary_size)
    recipe = language_model.TextRecipe(network, config, options, texts.FixedText(training))
    return loop_of(recipe, config.epochs * recipe.steps_per_epoch, config.batch * config.bptt)


def noisy_sine(network: SeriesLSTM) -> Tensor:
    """Return the standardised training values [T] of the LSTM."""
    series = datasets.sine()
    training = series.values[: series.split].float()
    network.store_statistics(training)
    return ((training - network.location) / network.scale)[: -LSTM.validation]


def workshop_lstm() -> Loop:
    network = SeriesLSTM(SeriesLSTMSizes())
    training = noisy_sine(network)
    criterion = nn.MSELoss()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    while True:
        for start in range(len(training) - LSTM_WINDOW):
            window, target = training[start : start + LSTM_WINDOW], training[start + LSTM_WINDOW]
            optimizer.zero_grad()
            outputs, _ = network.lstm(window.view(1, -1, 1))  # [1, 50, 64]
            loss = criterion(network.head(outputs[:, -1]), target.view(1, 1))
            loss.backward()
            optimizer.step()
            yield 1


def our_lstm() -> Loop:
    return loop_of(lstm.SineRecipe(LSTM, datasets.sine(), "cpu"), LSTM.steps, LSTM.batch * LSTM.horizon)


PAIRS = {
    "cnn": Pair(
        "images",
        Side(
            workshop_cnn,
            "the loader (PIL, ToTensor, Normalize, image by image): two fifths of a step; then convolutions",
        ),
        Side(our_cnn, "convolutions and pooling: seven tenths of a step; augmentation: a tenth"),
    ),
    "gan": Pair(
        "real images",
        Side(workshop_gan, "matrix products: under half of a step; the loader: a quarter; unfused Adam: a seventh"),
        Side(our_gan, "matrix products: three quarters of a step; Adam: a tenth"),
    ),
    "rnn": Pair(
        "windows",
        Side(workshop_rnn, "over a thousand tiny operations for one target; unfused Adam: a quarter", RNN_WINDOW),
        Side(our_rnn, "matrix products: over half of a step; tanh: a tenth"),
        "characters",
    ),
    "lstm": Pair(
        "windows",
        Side(workshop_lstm, "a fused LSTM at batch 1: under half of a step; unfused Adam: a third", LSTM_WINDOW),
        Side(our_lstm, "the fused LSTM over 50 + 49 + 49 steps, forward and back", LSTM_READ / LSTM.horizon),
        "values",
    ),
}
