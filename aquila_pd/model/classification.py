"""AquilaForSequenceClassification: the decoder with a linear classification head on the last real token.

Letters in shapes: B batch, T query length, D hidden.
"""

import paddle
import paddle.nn.functional as F
from paddle import nn

from ..configuration import AquilaConfig
from ..runtime.base import SequenceClassifierOutputWithPast
from ..utils.errors import AquilaError
from .outputs import as_tuple, cache_beside_loss
from .pretrained import AquilaPretrainedModel


class AquilaForSequenceClassification(AquilaPretrainedModel):
    """The decoder with a linear classification head on the last real token."""

    def __init__(self, config: AquilaConfig):
        super().__init__(config)
        self.aquila = self.base_model_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias_attr=False)

    def forward(
        self,
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        use_cache: bool | None = None,
        past_key_values=None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        """Scores [B, num_labels] in fp32, read at each row's last real token.

        The last real token is found in the 2-D attention_mask, without one by the pad id.
        labels: [B] class ids, [B] values for regression (num_labels 1), or [B, num_labels] floats for several
        labels at once; config.problem_type decides, or the labels' shape and dtype when it is None.
        """
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        output = self.aquila(
            input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=cache_beside_loss(use_cache, labels),
            past_key_values=past_key_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        last = self._last_token(input_ids, attention_mask, output.last_hidden_state)  # [B]
        pooled = output.last_hidden_state[paddle.arange(last.shape[0]), last]  # [B, D]
        logits = self.score(pooled).astype("float32")
        loss = None if labels is None else self._loss(logits, labels)
        if not return_dict:
            return (*(() if loss is None else (loss,)), logits, *as_tuple(output)[1:])
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _last_token(self, input_ids, attention_mask, x):
        """Index of the last real token of each row, [B]."""
        B, T = x.shape[:2]
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, -T:].astype("bool")
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        elif B == 1:
            real = paddle.ones([B, T], dtype="bool")
        else:
            raise AquilaError(
                "A batch of several rows needs an attention_mask or a pad_token_id in the config, "
                "to know where each row ends."
            )
        return (paddle.arange(T).unsqueeze(0) * real.astype("int64")).argmax(axis=-1)

    def _loss(self, logits, labels):
        problem = self.config.problem_type
        if problem is None:
            whole = labels.dtype in (paddle.int64, paddle.int32)
            several = "single_label_classification" if whole else "multi_label_classification"
            problem = "regression" if logits.shape[-1] == 1 else several
        if problem == "regression":
            return F.mse_loss(logits.squeeze(-1) if logits.shape[-1] == 1 else logits, labels.astype("float32"))
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels.astype("float32"))
