"""``Embedding`` with a low-rank update."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from fastlora import functional
from fastlora.layers.base import LoRALayer, Options
from fastlora.merge import Term


class Embedding(LoRALayer, nn.Embedding):
    """``nn.Embedding`` with a low-rank update; a drop-in for ``loralib.Embedding``.

    ``y = W[index] + scaling * A[:, index]ᵀ Bᵀ``, with the base table frozen.

    Args:
        num_embeddings: Rows of the table, V.
        embedding_dim: Size of a row, D.
        r: Rank; 0 gives a plain, trainable ``nn.Embedding``.
        lora_alpha: ``scaling = lora_alpha / r``.
        merge_weights: ``eval()`` merges the update into the table, ``train()`` takes it out again.
        use_rslora: ``scaling = lora_alpha / sqrt(r)``.
        init_lora_weights: True (A zero, B normal, as in loralib: only rows that were looked up get
            a gradient, so A stays sparse), "gaussian" (A normal with standard deviation 1 / r, B
            zero) or False (neither zero).
        lora_dtype: As for :class:`fastlora.Linear`.
        **kwargs: Those of ``nn.Embedding``. ``max_norm`` is refused where ``r > 0``: it rewrites
            the table while it is read, so the merged and unmerged layer would differ. ``sparse``
            is accepted; the factors' gradients are dense.

    A table that an output head shares is never merged, since that would change the head's output;
    :func:`fastlora.mark_only_lora_as_trainable`, ``inject`` and ``adapters.load`` find that out.

    Raises:
        ValueError, TypeError: an option is wrong; nothing was built.

    Shape:
        weight (V, D); lora_A (r, V); lora_B (D, r).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        options = Options(
            r,
            lora_alpha,
            0.0,
            merge_weights,
            use_rslora,
            init_lora_weights,
            lora_dtype,
        )
        if r > 0 and kwargs.get("max_norm") is not None:
            raise ValueError(
                f"max_norm: got {kwargs['max_norm']}, expected None with r > 0 "
                "(it rewrites the table at every lookup)"
            )
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        self._init_lora(options)
        if r > 0:
            self._add_factors(lora_A=(r, num_embeddings), lora_B=(embedding_dim, r))
        self.reset_parameters()

    @classmethod
    def from_embedding(cls, module: nn.Module, r: int, **options: Any) -> "Embedding":
        """A LoRA layer over an existing ``nn.Embedding``, whose table it shares.

        Args:
            module: ``nn.Embedding`` itself, not a subclass.
            r: Rank.
            **options: ``lora_alpha`` and those after it, as for the class.

        Raises:
            TypeError: another kind of module.
            ValueError: the module has a ``max_norm``.
        """
        return cls.like(module, r=r, **options).adopt(module)

    @classmethod
    def like(cls, module: nn.Module, **options: Any) -> Self:
        """A layer of the sizes of ``module``, on the meta device; see :meth:`from_embedding`."""
        if type(module) is not nn.Embedding:
            raise TypeError(
                f"module: got {type(module).__qualname__}, expected torch.nn.Embedding itself"
            )
        names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        kept = {name: getattr(module, name) for name in names}
        kept |= {"num_embeddings": module.num_embeddings, "embedding_dim": module.embedding_dim}
        return cls._with_sizes_of(kept, options)

    def reset_lora_parameters(self) -> None:
        """Draws the factors anew as ``init_lora_weights`` says."""
        if self.init_lora_weights is True:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)
        else:
            super().reset_lora_parameters()
            if self.padding_idx is not None:
                self.lora_A.data[:, self.padding_idx] = 0

    def forward(self, index: Tensor) -> Tensor:
        """Indices of any shape to (*shape, embedding_dim)."""
        if self._uses_base_only():
            return F.embedding(
                index,
                self.weight,
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse and not self.adapted,
            )
        return functional.lora_embedding(
            index,
            self.weight,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )

    def _merge_terms(self, weight: Tensor, lora: Mapping[str, Tensor]) -> list[Term]:
        return [Term(weight, lora["lora_A"].t(), lora["lora_B"].t())]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._lora_repr()}"
