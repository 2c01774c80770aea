"""`use_liger_kernel=True`: the same training with less memory, asked for as with any model of Transformers."""

import pytest
import torch
from tiny import LINEAR, output_and_gradients, tiny_model, tokens
from transformers import Trainer, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel


# Liger's norm and SwiGLU do not run in Triton's interpreter (0.8.5: 'float' object has no attribute 'to').
WITHOUT_GPU = {"rms_norm": False, "swiglu": False}


def assert_same(results, other, tolerance):
    torch.testing.assert_close(results[0].loss, other[0].loss, atol=tolerance, rtol=tolerance)
    for name, gradient in results[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=tolerance, rtol=100 * tolerance, msg=name)


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 100}], ids=["mean", "num_items_in_batch"])
def test_the_loss_without_logits_is_the_loss(options):
    """Training with Liger would learn something else, or still hold the logits of every token."""
    x = tokens(2, 20)
    plain = output_and_gradients(tiny_model().train(), input_ids=x, labels=x, **options)
    model = tiny_model().train()
    apply_liger_kernel(model, WITHOUT_GPU)
    fused = output_and_gradients(model, input_ids=x, labels=x, **options)
    assert plain[0].logits is not None and fused[0].logits is None
    assert_same(plain, fused, 1e-5)
    with torch.no_grad():  # evaluation and generation still have logits
        assert torch.equal(model.eval()(x, labels=x).logits, tiny_model()(x).logits)


def test_the_trainer_switches_it_on(tmp_path):
    """`use_liger_kernel=True` would be accepted for this model type, and do nothing."""
    x, losses = [{"input_ids": row, "labels": row} for row in tokens(4, 12)], []
    for liger in (False, True):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            use_liger_kernel=liger,
            liger_kernel_config=WITHOUT_GPU,
        )
        trainer = Trainer(model=tiny_model(layer_types=[LINEAR]), args=arguments, train_dataset=x)
        trainer.train()
        assert (trainer.model(input_ids=tokens(1, 5), labels=tokens(1, 5)).logits is None) == liger
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_head_that_is_not_a_plain_linear_keeps_its_logits():
    """An adapter on the head would silently do nothing, as the fused loss reads the weight alone."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model().train()
    apply_liger_kernel(model, WITHOUT_GPU)
    model.lm_head.__class__ = Doubled
    x = tokens(2, 6)
    assert (model(x, labels=x).logits == 2 * tiny_model()(x).logits).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
def test_all_of_liger_on_a_gpu(dtype, tolerance):
    """The fused SwiGLU and norm, which run on a GPU only, would change what is learned."""
    x, results = tokens(2, 70).cuda(), []
    for liger in (False, True):
        model = tiny_model(hidden_size=128, intermediate_size=256, linear_num_key_heads=2).to("cuda", dtype).train()
        if liger:
            apply_liger_kernel(model, {})
        output, gradients = output_and_gradients(model, input_ids=x, labels=x)
        results.append((output.loss, gradients))
    torch.testing.assert_close(results[0][0].float(), results[1][0].float(), atol=tolerance, rtol=tolerance)
    for name, gradient in results[0][1].items():
        assert (gradient - results[1][1][name]).norm() <= 10 * tolerance * gradient.norm(), name
