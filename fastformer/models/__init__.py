"""Models built from fastformer.nn, with what it takes to train them and to generate with them.

GPT, BERT and Seq2Seq are importable from here with torch alone. Pretrained checkpoints, ``tokenizer``, ``training`` and
``checkpoint`` need the packages of ``pip install fastformer[models]``, and say so. A run of training is put together in
``runs``, from texts and pairs (``data``, ``pairs``) and what a kind of model learns from them (``objectives``).
"""

from fastformer.models.bert import BERT
from fastformer.models.cache import KVCache, PagedKVCache
from fastformer.models.config import BERTConfig, GPTConfig, RotaryScaling, Seq2SeqConfig
from fastformer.models.embeddings import LoadedEmbeddings, load_embeddings
from fastformer.models.files import require
from fastformer.models.generation import Hypothesis
from fastformer.models.gpt import GPT
from fastformer.models.seq2seq import Seq2Seq, shift_right

__all__ = [
    "BERT",
    "GPT",
    "BERTConfig",
    "GPTConfig",
    "Hypothesis",
    "KVCache",
    "LoadedEmbeddings",
    "PagedKVCache",
    "RotaryScaling",
    "Seq2Seq",
    "Seq2SeqConfig",
    "load_embeddings",
    "require",
    "shift_right",
]
