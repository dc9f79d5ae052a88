"""An MoE layer computed by hand, token by token, from its weights; the experts have ReLU."""

import torch


def outputs_of_all(layer, x):
    """x [..., M] -> [..., E, M]: the output of every expert."""
    experts = layer.experts
    hidden = torch.relu(torch.einsum("...m,emh->...eh", x, experts.weight_in) + experts.bias_in)
    return torch.einsum("...eh,ehm->...em", hidden, experts.weight_out) + experts.bias_out


def assert_computes(layer, x, token_output, padding=None):
    """The layer's output for x [S, M], and all its gradients, are those of token_output(token [M]) -> [M]; zero at padding."""
    upstream = torch.randn_like(x)
    output = layer(x, padding)
    (output * upstream).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    skipped = [False] * len(x) if padding is None else padding.tolist()
    expected = torch.stack([torch.zeros_like(token) if skip else token_output(token) for token, skip in zip(x, skipped)])
    torch.testing.assert_close(output, expected)
    (expected * upstream).sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
