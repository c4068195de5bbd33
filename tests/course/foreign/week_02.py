"""Answers to the exercises of week 2, written by people who did not write its grader."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from tests.course.foreign.register import right, wrong


@wrong("The text is padded by one place too many, so the window ends before the present token.")
def context_windows(idx, window, padding):
    padded = F.pad(idx, (window, 0), value=padding)
    time = idx.shape[1]
    return torch.stack([padded[:, t : t + window] for t in range(time)], dim=1)


@wrong("A shift larger than the text makes a negative slice end, which fails for a short text.")
def context_windows(idx, window, padding):
    batch, time = idx.shape
    out = torch.full((batch, time, window), padding, dtype=torch.int64)
    for back in range(window):
        out[:, back:, window - 1 - back] = idx[:, : time - back]
    return out


@wrong("The batch is flattened before the windows are cut, so they reach into the previous text.")
def context_windows(idx, window, padding):
    batch, time = idx.shape
    start = torch.full((window - 1,), padding, dtype=idx.dtype)
    stream = torch.cat([start, idx.reshape(-1)])
    return stream.unfold(0, window, 1).reshape(batch, time, window).clone()


@wrong("The padding is filled in wherever the window holds 0, so real tokens with id 0 are lost.")
def context_windows(idx, window, padding):
    B, T = idx.shape
    out = torch.zeros(B, T, window, dtype=torch.long)
    for t in range(T):
        context = idx[:, max(0, t - window + 1) : t + 1]
        out[:, t, window - context.shape[1] :] = context
    out[out == 0] = padding
    return out


@right
def context_windows(idx, window, padding):
    batch, time = idx.shape
    rows = idx.tolist()
    nested = [
        [[row[p] if p >= 0 else padding for p in range(t - window + 1, t + 1)] for t in range(time)]
        for row in rows
    ]
    return torch.tensor(nested, dtype=torch.int64).reshape(batch, time, window)


@wrong("The scaling changes the caller's noise in place.")
def scaled_weights(noise, gain):
    fan_in = noise.shape[1]
    noise *= gain / fan_in**0.5
    return noise


@wrong("The noise is first standardised by its own mean and deviation, which changes the weights drawn.")
def scaled_weights(noise, gain):
    std = gain / math.sqrt(noise.size(1))
    normed = (noise - noise.mean()) / noise.std()
    return normed * std


@wrong("It is Xavier's rule, with inputs and outputs averaged, instead of Kaiming's.")
def scaled_weights(noise, gain):
    outputs, inputs = noise.shape
    return noise * gain * math.sqrt(2.0 / (inputs + outputs))


@wrong("It draws new weights and ignores the given noise and gain.")
def scaled_weights(noise, gain):
    weight = torch.empty_like(noise)
    torch.nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="tanh")
    return weight


@right
def scaled_weights(noise, gain):
    variance = gain**2 / noise.shape[-1]
    return torch.stack([unit.mul(variance**0.5) for unit in noise.unbind(0)])


@wrong("The indexing subtracts at every target of the batch in every position, not at its own target.")
def logit_gradient(logits, targets):
    batch, time, vocab_size = logits.shape
    grad = torch.softmax(logits, dim=-1)
    grad[:, :, targets.reshape(-1)] -= 1.0
    return grad / (batch * time)


@wrong("Only the softmax is divided by the number of positions, not the one that is subtracted.")
def logit_gradient(logits, targets):
    B, T, V = logits.shape
    probs = F.softmax(logits, dim=-1)
    one_hot = F.one_hot(targets, V).float()
    return probs / (B * T) - one_hot


@wrong("It divides by the batch size alone instead of batch * time.")
def logit_gradient(logits, targets):
    n = targets.shape[0]
    dlogits = F.softmax(logits, -1)
    rows = torch.arange(logits.shape[0]).unsqueeze(1)
    cols = torch.arange(logits.shape[1]).unsqueeze(0)
    dlogits[rows, cols, targets] -= 1
    dlogits /= n
    return dlogits


@wrong("The subtraction of the maximum changes the caller's logits in place.")
def logit_gradient(logits, targets):
    logits -= logits.max(dim=-1, keepdim=True).values
    exps = logits.exp()
    probs = exps / exps.sum(dim=-1, keepdim=True)
    probs.scatter_add_(-1, targets.unsqueeze(-1), -torch.ones_like(probs[..., :1]))
    return probs / targets.numel()


@right
def logit_gradient(logits, targets):
    def of_position(row, target):
        share = (row - torch.logsumexp(row, 0)).exp()
        return torch.stack([p - 1 if j == target else p for j, p in enumerate(share)])

    flat = logits.reshape(-1, logits.shape[-1])
    answers = targets.flatten().tolist()
    grads = [of_position(row, target) / len(answers) for row, target in zip(flat, answers)]
    return torch.stack(grads).reshape(logits.shape)


@wrong("The warmup divides by warmup_steps + 1, as nanoGPT does, instead of by warmup_steps.")
def learning_rate(step, steps, warmup_steps, peak, final_fraction):
    min_lr = final_fraction * peak
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if step >= steps:
        return min_lr
    ratio = (step - warmup_steps) / (steps - warmup_steps)
    coeff = 0.5 * (1.0 + math.cos(math.pi * ratio))
    return min_lr + coeff * (peak - min_lr)


@wrong("The warmup is computed before it is known whether there is one, so warmup_steps = 0 divides by 0.")
def learning_rate(step, steps, warmup_steps, peak, final_fraction):
    warm = peak * (step + 1) / warmup_steps
    progress = min(1.0, max(0.0, (step - warmup_steps) / max(1, steps - warmup_steps)))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    decayed = peak * (final_fraction + (1 - final_fraction) * cosine)
    return warm if step < warmup_steps else decayed


@wrong("final_fraction is used as the final learning rate itself, not as a share of the peak.")
def learning_rate(step, steps, warmup_steps, peak, final_fraction):
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= steps:
        return final_fraction
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return final_fraction + 0.5 * (peak - final_fraction) * (1 + math.cos(math.pi * progress))


@wrong("The cosine reaches its end one step early, at steps - 1.")
def learning_rate(step, steps, warmup_steps, peak, final_fraction):
    if step < warmup_steps:
        return (step + 1) / warmup_steps * peak
    decay_steps = max(1, steps - warmup_steps - 1)
    progress = min(1.0, (step - warmup_steps) / decay_steps)
    factor = 0.5 * (1 + math.cos(progress * math.pi))
    return peak * (factor * (1 - final_fraction) + final_fraction)


@right
def learning_rate(step, steps, warmup_steps, peak, final_fraction):
    if step in range(warmup_steps):
        return peak * ((step + 1) / warmup_steps)
    angle = np.interp(step, [warmup_steps, steps], [0.0, np.pi])
    height = np.cos(angle / 2) ** 2
    return float(peak * height + final_fraction * peak * (1 - height))


@wrong("torch.linalg.norm with ord=2 is the spectral norm of a matrix, not its Euclidean norm.")
def clip_gradients(gradients, max_norm):
    norms = [torch.linalg.norm(g, ord=2) for g in gradients]
    total = torch.linalg.norm(torch.stack(norms), ord=2)
    scale = torch.clamp(max_norm / total, max=1.0)
    return [g * scale for g in gradients]


@wrong("The norms of the tensors are added up instead of being combined as a root of squares.")
def clip_gradients(gradients, max_norm):
    total_norm = 0.0
    for g in gradients:
        total_norm += g.norm().item()
    if total_norm > max_norm:
        return [g * (max_norm / total_norm) for g in gradients]
    return [g.clone() for g in gradients]


@wrong("Gradients below max_norm are scaled up to it instead of being left alone.")
def clip_gradients(gradients, max_norm):
    flat = torch.cat([g.reshape(-1) for g in gradients])
    factor = max_norm / flat.norm()
    return [g * factor for g in gradients]


@wrong("The gradients are scaled in place, and the caller's own tensors come back.")
def clip_gradients(gradients, max_norm):
    total = math.sqrt(sum((g**2).sum().item() for g in gradients))
    if total > max_norm:
        for g in gradients:
            g.mul_(max_norm / total)
    return list(gradients)


@right
def clip_gradients(gradients, max_norm):
    everything = torch.cat([g.flatten() for g in gradients])
    length = torch.sqrt(torch.dot(everything, everything))
    everything = everything / max(1.0, float(length) / max_norm)
    parts = torch.split(everything, [g.numel() for g in gradients])
    return [part.reshape(g.shape).clone() for part, g in zip(parts, gradients)]


@wrong("The running means are updated in place, so the caller's first and second change.")
def adamw_step(weight, gradient, first, second, step, lr, beta1, beta2, eps, weight_decay):
    first.mul_(beta1).add_(gradient, alpha=1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    m_hat = first / (1 - beta1**step)
    v_hat = second / (1 - beta2**step)
    new_weight = weight - lr * weight_decay * weight - lr * m_hat / (v_hat.sqrt() + eps)
    return new_weight, first, second


@wrong("The decay shrinks the weight after the step, so the step itself is decayed too.")
def adamw_step(weight, gradient, first, second, step, lr, beta1, beta2, eps, weight_decay):
    m = beta1 * first + (1 - beta1) * gradient
    v = beta2 * second + (1 - beta2) * gradient**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    weight = weight - lr * m_hat / (torch.sqrt(v_hat) + eps)
    weight = weight * (1 - lr * weight_decay)
    return weight, m, v


@wrong("eps is added before the bias correction of the root, so it is scaled along with it.")
def adamw_step(weight, gradient, first, second, step, lr, beta1, beta2, eps, weight_decay):
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient.square()
    step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    update = step_size * first / (second.sqrt() + eps)
    return weight - update - lr * weight_decay * weight, first, second


@wrong("The decay is added to the gradient, as in Adam with L2, instead of acting on the weight alone.")
def adamw_step(weight, gradient, first, second, step, lr, beta1, beta2, eps, weight_decay):
    g = gradient + weight_decay * weight
    new_first = torch.lerp(first, g, 1 - beta1)
    new_second = torch.lerp(second, g * g, 1 - beta2)
    mean = new_first / (1 - beta1**step)
    root = (new_second / (1 - beta2**step)).sqrt()
    return weight - lr * mean / (root + eps), new_first, new_second


@right
def adamw_step(weight, gradient, first, second, step, lr, beta1, beta2, eps, weight_decay):
    w, g, m, v = (t.detach().numpy().astype(np.float64) for t in (weight, gradient, first, second))
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g * g - v)
    direction = (m / (1 - math.pow(beta1, step))) / (np.sqrt(v / (1 - math.pow(beta2, step))) + eps)
    w = w - lr * (direction + weight_decay * w)
    return tuple(torch.from_numpy(np.asarray(a)).to(torch.float32) for a in (w, m, v))
