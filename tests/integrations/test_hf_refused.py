"""What the mixin for transformers' Trainer refuses, and when."""

import pytest

pytest.importorskip("transformers")

from transformers import Trainer

from cwclip_kernels.integrations.transformers import ComponentClipCallback, ComponentClipTrainerMixin
from hf import ClippingTrainer, arguments, encoder, examples, on_one_thread

_on_one_thread = pytest.fixture(autouse=True)(on_one_thread)


@pytest.mark.parametrize(
    ("component_clipping", "kind", "message"),
    [
        ({"max_norm": "low"}, TypeError, "max_norm: expected a number"),
        ({"max_norm": {"encoder.*": 0.1}}, ValueError, "max_norm: .*'encoder"),
        ({"components": "block"}, ValueError, "components: .*'block'"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite: expected one of"),
        ({"log_norms": "head.*"}, ValueError, r"log_norms: 'head.\*' matches none of the 41 components"),
        ({"log_norms": 3}, TypeError, "log_norms: expected a pattern"),
        ({"max_nrom": 1.0}, TypeError, "max_nrom"),
    ],
)
def test_wrong_arguments_are_named_when_the_trainer_is_made(tmp_path, component_clipping, kind, message):
    with pytest.raises(kind, match=message):
        ClippingTrainer(encoder(), arguments(tmp_path), component_clipping=component_clipping)


def test_settings_of_a_class(tmp_path):
    class Tight(ComponentClipTrainerMixin, Trainer):
        component_clipping = {"max_norm": 1e-3}  # noqa: RUF012

    trainer = Tight(encoder(), arguments(tmp_path, max_steps=1), train_dataset=examples())
    trainer.train()
    assert trainer.last.caps.item() == 1e-3
    assert trainer.last_clip is trainer.last  # its older name


def test_the_order_of_bases():
    with pytest.raises(TypeError, match="Wrong: put ComponentClipTrainerMixin before Trainer"):
        type("Wrong", (Trainer, ComponentClipTrainerMixin), {})
    with pytest.raises(TypeError, match="Alone is no Trainer"):
        type("Alone", (ComponentClipTrainerMixin,), {})()


def test_another_trainer_than_it_is_made_for_is_refused_by_name(tmp_path):
    class Changed(Trainer):
        def _clip_grad_norm(self, model, optimizer):
            return None

    with pytest.raises(RuntimeError, match=r"transformers 5.*_clip_grad_norm was \(self, model\), here it is \(self"):
        type("Clipping", (ComponentClipTrainerMixin, Changed), {})

    class Elsewhere(ClippingTrainer):  # with a loop of its own
        def _clip_grad_norm(self, model):
            return None

        def _get_grad_norm(self, model, grad_norm=None):
            return None

    trainer = Elsewhere(encoder(), arguments(tmp_path), train_dataset=examples())
    with pytest.raises(
        RuntimeError,
        match="nothing was clipped: .*: Elsewhere, ClippingTrainer, .*, Trainer; use",
    ):
        trainer.train()


def test_gradients_that_are_used_up_in_backward(tmp_path):
    model = encoder()

    def step_at_once(parameter):
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_at_once)
    with pytest.raises(RuntimeError, match=r"steps inside backward .* use another args.optim"):
        ClippingTrainer(model, arguments(tmp_path), train_dataset=examples()).train()


def test_clipped_by_the_callback_as_well(tmp_path):
    trainer = ClippingTrainer(
        encoder(), arguments(tmp_path), train_dataset=examples(), callbacks=[ComponentClipCallback(0.05)]
    )
    with pytest.raises(ValueError, match="callbacks: ComponentClipCallback would clip again"):
        trainer.train()
