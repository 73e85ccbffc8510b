"""The criterion trime_loss: against a loop, and without memory against fairseq."""

import types

import pytest
import torch
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.logging import metrics
from helpers.small import make_dictionary
from helpers.trime import KINDS, PAD, WORDS, loop_loss, make_model, make_sample, sees

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.plugin.trime_criterion import TrimeLoss
from fairseq_knnlm.probability import batch_memory

TASK = types.SimpleNamespace(
    target_dictionary=make_dictionary(WORDS), key={"type": "ffn-input", "layer": -1}
)


def criterion(memory="local", warmup=0, max_update=0, **changed):
    settings = {
        "trime_memory": memory, "trime_warmup_updates": warmup, "trime_own_dropped": 0.9,
        "sentence_avg": False, "max_update": max_update, "ddp_backend": "pytorch_ddp", **changed,
    }  # fmt: skip
    return TrimeLoss(TASK, types.SimpleNamespace(**settings))


def loss_and_gradients(loss_of, model, sample, seed=0):
    """The summed loss, as a float, and the gradients by the name of the parameter."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = loss_of(model, sample)[0]
    loss.sum().backward()
    return loss.sum().item(), {
        name: None if part.grad is None else part.grad.clone()
        for name, part in model.named_parameters()
    }


def assert_equal(found, expected, tolerance=1e-5):
    """Loss and gradients, relative to the largest gradient of all."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    scale = max(part.abs().max().item() for part in expected[1].values() if part is not None)
    for name, gradient in expected[1].items():
        if gradient is None:
            assert found[1][name] is None or not found[1][name].any()
        else:
            difference = (found[1][name].double() - gradient.double()).abs().max()
            assert difference <= tolerance * scale, name


# -- against the formula ---------------------------------------------------------------------------


@pytest.mark.parametrize("products", [1 << 22, 40])
@pytest.mark.parametrize("memory", ["local", "long"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_a_loop(kind, memory, products, monkeypatch):
    """Also where the products of a batch do not fit in memory at once."""
    monkeypatch.setattr(batch_memory, "MAX_PRODUCTS", products)
    model, sample = make_model(kind).eval(), make_sample()
    found = loss_and_gradients(criterion(memory), model, sample)
    assert_equal(found, loop_loss(model, sample, sees(memory)))


@pytest.mark.parametrize("products", [1 << 22, 40])
@pytest.mark.parametrize("dropped", [0.0, 0.5, 1.0])
def test_external_sees_the_others_and_at_times_its_own(dropped, products, monkeypatch):
    monkeypatch.setattr(batch_memory, "MAX_PRODUCTS", products)
    model, sample = make_model("adaptive-tied").eval(), make_sample()
    external = criterion("external", trime_own_dropped=dropped)
    found = loss_and_gradients(external, model, sample, seed=0)
    torch.manual_seed(0)
    own = torch.rand(3) >= dropped
    assert own.any() != own.all() if dropped == 0.5 else own.all() == (dropped == 0.0)
    assert_equal(found, loop_loss(model, sample, sees("external", own)))


def test_memories_of_external_are_local_in_validation():
    model, sample = make_model("plain").eval(), make_sample()
    found = loss_and_gradients(criterion("external").eval(), model, sample)
    assert_equal(found, loop_loss(model, sample, sees("local")))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("kind", ["tied", "adaptive"])
def test_half_precision(kind, dtype, tolerance):
    """Sums are float32: the loss is as close as the states are."""
    model, sample = make_model(kind).to(dtype).eval(), make_sample()
    loss, _, logged = criterion()(model, sample)
    loss.backward()
    assert loss.dtype == torch.float32 and logged["loss"].dtype == torch.float32
    expected, _ = loop_loss(model, sample, sees("local"))
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    gradients = [part.grad for part in model.parameters() if part.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_products_beyond_the_range_of_half_precision():
    model, sample = make_model("plain").half().eval(), make_sample()
    model.decoder.layers[-1].final_layer_norm.weight.data.fill_(200.0)
    loss, _, _ = criterion()(model, sample)
    assert torch.isfinite(loss)


# -- without memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("without", [{"memory": "none"}, {"warmup": 3}])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_without_memory_it_is_the_criterion_of_fairseq(kind, dropout, without):
    model, sample = make_model(kind, dropout).train(), make_sample()
    stock = AdaptiveLoss if kind.startswith("adaptive") else CrossEntropyCriterion
    expected = loss_and_gradients(stock(TASK, False), model, sample)
    assert_equal(loss_and_gradients(criterion(**without), model, sample), expected, 1e-6)


def test_the_losses_of_tokens_sum_to_the_loss():
    model, sample = make_model("adaptive").eval(), make_sample()
    each, size, _ = criterion()(model, sample, reduce=False)
    assert each.shape == (21,) and size == 19
    assert not each[sample["target"].view(-1) == PAD].any()
    assert each.sum().item() == pytest.approx(criterion()(model, sample)[0].item(), rel=1e-6)


def test_the_memory_is_used_after_the_warmup():
    model, sample = make_model("plain").eval(), make_sample()
    without, with_memory = (criterion(name)(model, sample)[0].item() for name in ("none", "local"))
    assert without != with_memory
    warming = criterion(warmup=None, max_update=60)  # 5% of them
    losses = []
    for update in (0, 2, 3, 4):
        warming.set_num_updates(update)
        losses.append(warming(model, sample)[0].item())
    assert losses == [without, without, with_memory, with_memory]
    warming.set_num_updates(0)
    assert warming.eval()(model, sample)[0].item() == with_memory


# -- logging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sentence_avg", [False, True])
def test_perplexity_is_logged_with_and_without_memory(sentence_avg):
    """Of batches of different sizes, as processes and --update-freq make them."""
    model = make_model("adaptive").eval()
    samples = make_sample(), make_sample((4, 2), seed=8)
    loss = criterion(sentence_avg=sentence_avg)
    outputs = [loss(model, sample)[2] for sample in samples]
    summed = [{name: outputs[0][name] + outputs[1][name] for name in outputs[0]}]
    expected = {
        name: sum(loop_loss(model, sample, sees(memory))[0] for sample in samples) / 25
        for name, memory in (("ppl", "local"), ("lm_ppl", "none"))
    }
    for logged in (outputs, summed):
        with metrics.aggregate(new_root=True) as aggregated:
            TrimeLoss.reduce_metrics(logged)
        values = aggregated.get_smoothed_values()
        for name, nats in expected.items():
            assert values[name] == pytest.approx(torch.tensor(nats).exp().item(), abs=0.01)


# -- what is refused, and what is left -------------------------------------------------------------


def test_settings_that_cannot_be_are_refused_together():
    with pytest.raises(UserError) as error:
        criterion(warmup=-1, trime_own_dropped=1.5)
    assert "--trime-warmup-updates" in str(error.value) and "got 1.5" in str(error.value)
    with pytest.raises(UserError, match="--task knnlm_lm"):
        TrimeLoss(types.SimpleNamespace(), criterion_settings())


def criterion_settings():
    return types.SimpleNamespace(trime_own_dropped=0.9, trime_warmup_updates=None)


def test_states_without_gradients_are_refused():
    """As those are that --checkpoint-activations computes again."""
    model, sample = make_model("plain").eval(), make_sample()
    layer = model.decoder.layers[-1]
    layer.final_layer_norm.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(UserError, match="--checkpoint-activations"):
        criterion()(model, sample)
    assert not layer.fc1._forward_pre_hooks


def test_no_hook_survives():
    model, sample = make_model("plain").eval(), make_sample()
    criterion()(model, sample)
    assert not any(module._forward_pre_hooks for module in model.modules())
    sample["net_input"]["src_tokens"] = None
    with pytest.raises(AttributeError):
        criterion()(model, sample)
    assert not any(module._forward_pre_hooks for module in model.modules())
