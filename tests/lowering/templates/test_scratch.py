"""Kernels that need memory of their own get it in every thread, from whoever the thread has asked."""

import contextvars
import threading
import types

import pytest
import torch
import triton
from triton.runtime import _allocation

from lowering.templates import scratch
from lowering.templates.scratch import lend_memory


@pytest.fixture
def lent(monkeypatch):
    """Triton's module as it is before anybody has lent memory, then lent to."""
    found = _allocation._allocator
    monkeypatch.setattr(_allocation, "_allocator", getattr(found, "variable", found))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lend_memory(_allocation)
    return _allocation


def in_thread(function, *, context=None):
    answers = []
    thread = threading.Thread(target=lambda: answers.append((context or contextvars.Context()).run(function)))
    thread.start()
    thread.join()
    return answers[0]


def test_a_new_thread_has_memory(lent, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "empty", lambda size, **options: asked.append((size, options)))
    in_thread(lambda: lent._allocator.get()(640, 64, None))
    assert asked == [(640, {"dtype": torch.int8, "device": "cuda"})]


def test_who_sets_an_allocator_keeps_it(lent):
    def own(size, alignment, stream): ...

    def set_and_get():
        triton.set_allocator(own)
        return lent._allocator.get()

    assert in_thread(set_and_get) is own
    assert in_thread(lent._allocator.get) is scratch._from_torch


def test_without_cuda_triton_says_so_itself(lent, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert in_thread(lent._allocator.get) is lent._NULL_ALLOCATOR


def test_a_triton_that_keeps_it_otherwise_is_left_alone():
    lend_memory(types.ModuleType("triton.runtime._allocation"))


def test_it_is_a_context_variable_otherwise(lent):
    assert lent._allocator.name == "_allocator"


def test_lending_twice_is_lending_once(lent):
    before = lent._allocator
    lend_memory(lent)
    assert lent._allocator is before
