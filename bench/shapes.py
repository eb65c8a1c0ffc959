"""Sizes of real models, and the student-teacher pairs that the benchmark takes from them. No other file has any."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Model:
    """What a loss head sees of a model: its vocabulary, its width, and the cap on its logits."""

    vocab: int
    width: int
    softcap: float | None = None


@dataclass(frozen=True)
class Shape:
    """N tokens, V words, the widths of student and teacher."""

    name: str
    rows: int
    vocab: int
    dim: int
    teacher_dim: int
    softcap: float | None = None

    def resized(self, *, rows: int | None = None, vocab: int | None = None) -> Shape:
        """Return the shape with another N or V."""
        return replace(self, rows=rows or self.rows, vocab=vocab or self.vocab)


MODELS = {
    "Qwen3-0.6B": Model(151_936, 1024),
    "Qwen3-1.7B": Model(151_936, 2048),
    "Qwen3-8B": Model(151_936, 4096),
    "Qwen3-32B": Model(151_936, 5120),
    "Llama-3.2-1B": Model(128_256, 2048),
    "Llama-3.1-8B": Model(128_256, 4096),
    "Gemma-2-2B": Model(256_000, 2304, softcap=30.0),
    "Gemma-2-9B": Model(256_000, 3584, softcap=30.0),
    "Gemma-3-1B": Model(262_144, 1152),
    "Gemma-3-4B": Model(262_208, 2560),
    "Phi-4": Model(100_352, 5120),
    "Phi-4-mini": Model(200_064, 3072),
}


def pair(student: str, teacher: str, rows: int = 8192) -> Shape:
    """Return the shape of distilling one model into another, over the vocabulary that they share."""
    s, t = MODELS[student], MODELS[teacher]
    vocab = min(s.vocab, t.vocab)
    return Shape(f"{student} from {teacher}", rows, vocab, s.width, t.width, s.softcap)


QWEN3 = pair("Qwen3-1.7B", "Qwen3-8B")
QWEN3_WIDE = pair("Qwen3-8B", "Qwen3-8B")
QWEN3_NARROW = pair("Qwen3-0.6B", "Qwen3-8B")
LLAMA3 = pair("Llama-3.2-1B", "Llama-3.1-8B")
LLAMA3_WIDE = pair("Llama-3.1-8B", "Llama-3.1-8B")
GEMMA2 = pair("Gemma-2-2B", "Gemma-2-9B")
GEMMA3 = pair("Gemma-3-1B", "Gemma-3-4B")
PHI4 = pair("Phi-4", "Phi-4")
PHI4_MINI = pair("Phi-4-mini", "Phi-4-mini")

# What a CPU can do in seconds: the vocabulary is real, the widths and the batch are small.
CPU = Shape("Qwen3's vocabulary, narrow heads", 512, MODELS["Qwen3-0.6B"].vocab, 256, 512)
QUICK = Shape("tiny", 24, 1500, 16, 32)

GPU_VOCABULARIES = (32_000, 64_000, 100_352, 151_936, 256_000)
GPU_ROWS = (1024, 2048, 4096, 8192, 16_384)
CPU_VOCABULARIES = (32_000, 64_000, 100_352, 151_936, 256_000)
CPU_ROWS = (128, 256, 512, 1024)
QUICK_VOCABULARIES = (500, 1500)
QUICK_ROWS = (12, 24)
