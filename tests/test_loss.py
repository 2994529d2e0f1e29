"Faults of the loss, and what class weights mean for a loss a picture."
import pytest
import torch
import torch.nn.functional as F

from fd_focus.loss import FocusLoss


@pytest.mark.parametrize("options,message", [
    (dict(reduction="max"), "reduction='max'; use 'mean', 'sum' or 'none'"),
    (dict(label_smoothing=1.5), "label_smoothing=1.5; use 0 or more, and less than 1"),
    (dict(label_smoothing=1), "label_smoothing=1; use 0 or more, and less than 1"),
    (dict(label_smoothing=-.1), "label_smoothing=-0.1; use 0 or more, and less than 1"),
    (dict(head_weights=dict(image=-1)), "must not be negative"),
    (dict(distill=-1.), "distill=-1.0 is a weight"),
    (dict(criterion=F.cross_entropy, weight=torch.ones(3)), "give them to your criterion"),
    (dict(criterion=F.cross_entropy, label_smoothing=.1), "give them to your criterion")])
def test_faults(options, message):
    with pytest.raises(ValueError, match=message): FocusLoss(**options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights_mean_what_they_mean_in_pytorch(reduction):
    torch.manual_seed(0)
    logits, target, weight = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([1., 5., .5])
    ours = FocusLoss(weight=weight, reduction=reduction)
    assert torch.allclose(ours(logits, target), F.cross_entropy(logits, target, weight, reduction=reduction))
    in_training = ours(dict(image=logits, region=logits[:, None].expand(6, 4, 3)), target)
    assert torch.allclose(in_training, 2 * ours(logits, target), atol=1e-6)


def test_a_training_step_moves_every_head_and_the_terms_hold_no_graph():
    outputs = {name: torch.randn(4, 3, requires_grad=True) for name in ("image", "hybrid")}
    loss = FocusLoss(distill=1.)
    loss(outputs, torch.tensor([0, 1, 2, 0])).backward()
    assert all(logits.grad.abs().sum() > 0 for logits in outputs.values())
    assert list(loss.terms) == ["image", "hybrid", "distill"]
    assert not any(term.requires_grad for term in loss.terms.values())
