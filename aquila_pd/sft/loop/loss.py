"""Summed token loss: the language model and its head as one layer whose output is a sum of cross-entropies.

A sum and not a mean: only the step as a whole knows its number of labels. Logits are made of the places that
have a label and of no others: the head over a vocabulary of 100,000 is the widest product there is. They are never
all there at once (ops/linear_cross_entropy.py).
"""

import paddle
from paddle import nn

from ...architecture.labels import IGNORE_INDEX
from ...modeling import AquilaForCausalLM
from ...ops.attention_mask import PackedMask


class SummedLoss(nn.Layer):
    """The sum of cross-entropies of a batch of packs.

    neftune: alpha of NEFTune's noise on the embeddings of a sample with n tokens, uniform within alpha / sqrt(n * D);
    0 is none. Only in training.
    """

    def __init__(self, model: AquilaForCausalLM, *, neftune: float = 0.0):
        super().__init__()
        self.model = model
        self.neftune = neftune

    @property
    def config(self):
        return self.model.config

    def forward(self, input_ids, labels, position_ids, segment_ids):
        """int [B, T] each, labels already shifted, -100 where there is none -> float32 scalar."""
        decoder = self.model.aquila
        embeds = decoder.embed(input_ids)
        if self.neftune and self.training:
            embeds = embeds + self._noise(segment_ids, embeds)
        x = decoder(
            inputs_embeds=embeds,
            position_ids=position_ids,
            segment_ids=segment_ids,
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        flat = labels.reshape([-1])
        learned = paddle.nonzero(flat != IGNORE_INDEX).squeeze(1)  # [labels]
        # 0 times the whole: every parameter is in the graph, also where nothing is learned, as other ranks expect
        nothing = x.astype("float32").sum() * 0.0
        if learned.shape[0] == 0:
            return nothing + self.model.summed_loss(x.reshape([-1, x.shape[-1]])[:1], flat[:1].clip(min=0)) * 0.0
        x = paddle.gather(x.reshape([-1, x.shape[-1]]), learned)  # [labels, D]
        return nothing + self.model.summed_loss(x, paddle.gather(flat, learned))

    def _noise(self, segment_ids, embeds):
        lengths = PackedMask(segment_ids).lengths.astype("float32").unsqueeze(-1)  # [B, T, 1]
        bound = self.neftune / (lengths * embeds.shape[-1]).sqrt()
        noise = paddle.uniform(embeds.shape, "float32", min=-1.0, max=1.0) * bound
        return noise.astype(embeds.dtype)
