"""What KCD refuses in a plain loop, and what it says then."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tenfold.errors import StateError, UserError
from tenfold.methods import KCD
from tests.distilling import (
    CLASSES,
    SIZE,
    Pictures,
    data,
    epoch,
    images,
    make,
    network,
    scaled,
    start,
    teacher,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio=0\.0"),
        ({"keep_ratio": 1.1}, r"keep_ratio=1\.1"),
        ({"stages": 0}, "stages=0"),
        ({"augment_max": 1.0}, r"augment_max=1\.0"),
        ({"augment_max": -0.1}, r"augment_max=-0\.1"),
        ({"visit_power": -1.0}, r"visit_power=-1\.0"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"distiller": "att"}, "did you mean at"),
        ({"distiller": "at"}, r"name the modules they come from, such as layers: \[layer1"),
        ({"distiller": "sp", "layers": ["a", "b"]}, "sp compares one layer"),
        ({"layers": ["4"]}, "kd compares logits alone"),
        ({"distiller": "vid", "layers": ["a"], "teacher_layers": ["a", "b"]}, "layers names 1"),
        ({"distiller": "sp", "layers": "layer3"}, "expected a list of module names"),
        ({"drop_window": "most"}, "drop_window='most': expected step or all"),
        ({"mix_source": "new"}, "mix_source='new'"),
        ({"unseen": "drop"}, "unseen='drop'"),
        ({"label_weight": 0.0, "logit_weight": 0.0}, "nothing would be learned"),
        ({"label_weight": -1.0}, r"label_weight=-1\.0"),
        ({"feature_weight": 2.0}, "compares no features"),
        ({"teacher_cache": ""}, "teacher_cache=''"),
        ({"teacher_cache": "memory", "distiller": "sp", "layers": ["4"]}, "teacher_cache keeps"),
        ({"teacher": 3}, "teacher=3"),
        ({"teacher": ""}, "teacher=''"),
        ({"negatives": 0}, "negatives=0"),
    ],
)
def test_fields_that_can_not_be(fields, text):
    with pytest.raises(UserError, match=text):
        make(**fields)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1, 6, 6), 0


class Odd(Pictures):
    """One image is larger than the others."""

    def __getitem__(self, index: int):
        side = 7 if index == 5 else 6
        return torch.zeros(1, side, side, dtype=torch.uint8), index % CLASSES


FLOATS = TensorDataset(scaled(images()), torch.arange(SIZE) % CLASSES)


@pytest.mark.parametrize(
    ("fields", "options", "text"),
    [
        ({}, {"dataset": Stream()}, "Stream is a stream"),
        ({}, {"dataset": TensorDataset(torch.zeros(0, 1), torch.zeros(0))}, "dataset is empty"),
        ({}, {"dataset": [torch.zeros(1)]}, r"item 0 of the dataset is Tensor"),
        ({}, {"epochs": 2}, "stages=3 and 2 epochs"),
        ({"teacher": network(1)}, {}, "the teacher is in training mode"),
        ({"teacher": network(1).eval()}, {}, "want gradients"),
        ({"teacher": "resnet56"}, {}, "give the network itself"),
        ({"distiller": "sp", "layers": ["44"]}, {}, "the (student|teacher) has no module '44'"),
        ({"distiller": "at", "layers": ["7"]}, {}, "these layers give vectors"),
        ({"teacher_cache": "memory"}, {}, r"attach\(…, views=…\)"),
        ({}, {"dataset": FLOATS, "transform": None}, "image 0 of the dataset is torch.float32"),
        ({}, {"dataset": Pictures("pil"), "transform": None}, "images as Image: expected tensors"),
        ({}, {"total_steps": 5}, "gives it both"),
        ({}, {"dataset": None}, "gives it both"),
        ({"keep_ratio": 0.01, "stages": 1}, {}, "keeps none of 48|48 samples would leave"),
        ({"keep_ratio": 0.2, "stages": 1}, {}, "38 samples would leave in stage 1"),
    ],
)
def test_runs_that_can_not_be_are_refused_ahead_of_the_first_step(fields, options, text):
    kcd = make(**fields)
    with pytest.raises(UserError, match=text):
        start(kcd, **options)


def test_an_odd_image_is_named_when_it_is_to_be_mixed():
    kcd = make()
    start(kcd, dataset=Odd("odd"))
    kcd.epoch_end()
    values = torch.arange(SIZE, 0, -1.0)
    values[5], values[36] = values[36].clone(), values[5].clone()  # among the last that stay
    kcd._work.knowledge.table.record(torch.arange(SIZE), values)
    with pytest.raises(UserError, match=r"\(id 5\): expected one shape"):
        kcd.epoch_end()


def test_a_student_that_is_its_own_teacher():
    net = teacher()
    with pytest.raises(UserError, match="share parameters"):
        KCD(teacher=net).attach(net, dataset=data(), epochs=6, transform=scaled)


def test_a_teacher_that_begins_to_train_is_noticed():
    kcd = make()
    student, optimizer = start(kcd)
    kcd.teacher.train()
    with pytest.raises(UserError, match="the teacher is in training mode"):
        epoch(kcd, student, optimizer)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (None, "one id a sample; let the loader give"),
        (torch.arange(5), r"ids are \(5,\)"),
        (torch.arange(8.0), "ids are torch.float32: expected integers"),
        (torch.arange(8) + 41, "ids from 41 to 48: expected 0 to 47"),
        (torch.arange(8) - 1, "ids from -1 to 6"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, 2]), "ids 2 occur twice in a batch"),
    ],
)
def test_ids_that_can_not_be(ids, text):
    kcd = make()
    start(kcd)
    with pytest.raises(UserError, match=text):
        kcd.loss(torch.zeros(8, 1, 6, 6), torch.zeros(8).long(), ids)


@pytest.mark.parametrize(
    ("logits", "text"),
    [
        (torch.zeros(8), "at least 2 classes"),
        (torch.zeros(8, 1), "at least 2 classes"),
        (torch.zeros(8, CLASSES + 1), "the teacher knows 3 classes and the student 4"),
        (torch.tensor([[0.0, 0, 0]] * 6 + [[math.nan] * 3, [0, math.inf, 0]]), "ids 6, 7"),
    ],
)
def test_logits_that_can_not_be(logits, text):
    kcd = make()
    start(kcd)
    with pytest.raises(UserError, match=text):
        kcd.loss(torch.zeros(8, 1, 6, 6), torch.zeros(8).long(), torch.arange(8), logits=logits)


def test_a_teacher_whose_logits_are_not_finite_is_named():
    kcd = make()
    start(kcd)
    image = torch.zeros(8, 1, 6, 6)
    image[3] = math.inf
    with pytest.raises(UserError, match=r"the teacher's logits are not finite .* \(ids 3\)"):
        kcd.loss(image, torch.zeros(8).long(), torch.arange(8), logits=torch.zeros(8, CLASSES))


def test_samples_that_were_never_seen_stop_the_condensation():
    kcd = make()
    student, optimizer = start(kcd)
    half = DataLoader(kcd.dataset, 8, sampler=range(24))
    epoch(kcd, student, optimizer, loader=half)
    with pytest.raises(UserError, match=r"24 of 48 samples have not been visited yet \(ids 24, 25"):
        epoch(kcd, student, optimizer, loader=half)


def test_a_dataset_that_changes_its_length_is_noticed():
    growing = [(image, index % CLASSES) for index, image in enumerate(images())]
    kcd = make()
    student, optimizer = start(kcd, dataset=growing)
    growing.append(growing[0])
    with pytest.raises(UserError, match="the dataset has 49 samples and had 48"):
        epoch(kcd, student, optimizer)


def test_moments_that_come_too_early_or_too_late():
    kcd = make()
    with pytest.raises(StateError, match="attach"):
        kcd.epoch_end()
    with pytest.raises(StateError, match=r"attach\(student, dataset=…, epochs=…\) first"):
        _ = kcd.dataset
    student, optimizer = start(kcd, epochs=3)
    with pytest.raises(StateError, match=r"call epoch_end\(\) after each"):
        kcd.finalize(student)
    with pytest.raises(StateError, match="one object serves one model once"):
        start(kcd, epochs=3)
    for _ in range(3):
        epoch(kcd, student, optimizer)
    with pytest.raises(StateError, match="all 3 epochs are done"):
        kcd.epoch_end()
