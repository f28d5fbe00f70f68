import torch
import torch.nn.functional as F
def windowed_attention(queries, keys, values, window, *, scale, sinks=None):
    b, n, s, c = queries.shape
    g, l = keys.shape[1], keys.shape[2]
    r = n // g
    w = window
    keys = keys[:, :, max(l - s - w + 1, 0):]; values = values[:, :, max(l - s - w + 1, 0):]
    past = keys.shape[2] - s
    nb = -(-s // w)
    pad = nb * w - s
    k = F.pad(keys, (0, 0, w - past, pad)).unfold(2, 2 * w, w)  # b g nb c 2w
    v = F.pad(values, (0, 0, w - past, pad)).unfold(2, 2 * w, w)
    q = F.pad(queries, (0, 0, 0, pad)).view(b, g, r, nb, w, c).permute(0, 1, 3, 2, 4, 5).reshape(b, g, nb, r * w, c)
    scores = (q * scale) @ k
    i = torch.arange(w)[:, None]; j = torch.arange(2 * w)
    mask = ((j > i) & (j <= i + w)).repeat(r, 1)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -1e30)
    scores = scores + bias
    if past < w:
        first = torch.zeros(nb, 1, 2 * w); first[0, :, : w - past] = -1e30
        scores = scores + first
    out = scores.softmax(-1) @ v.mT
    return out.view(b, g, nb, r, w, c).permute(0, 1, 3, 2, 4, 5).reshape(b, n, nb * w, c)[:, :, :s]
