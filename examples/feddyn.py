"""FedDyn (Acar et al. 2021, ICLR): --drift_control=examples.feddyn:FedDyn."""

import dataclasses

import jax
import optax

import fedmmr_jax as fm


@dataclasses.dataclass(frozen=True)
class FedDyn(fm.DriftControl):
  """A client keeps g and minimises L(w) − ⟨g, w⟩ + α/2 |w − w_server|²."""

  alpha: float = 0.1

  def client_state(self, params):
    return optax.tree.zeros_like(params)

  server_state = client_state  # h

  def transform(self, sent, kept):
    def pull(d, g, w, w0):
      return d - g + self.alpha * (w - w0)

    def update(d, w0, w):
      return jax.tree.map(pull, d, kept, w, w0), w0

    return optax.GradientTransformation(lambda params: params, update)

  def finish(self, result):
    moved = optax.tree.scale(self.alpha, result.whole(result.delta))
    return optax.tree.sub(result.kept, moved), None

  def server_step(self, state, uploaded, cohort, delta, optimizer):
    share = cohort.size / cohort.all_size
    state = jax.tree.map(lambda h, d: h - self.alpha * share * d, state, delta)
    delta = jax.tree.map(lambda d, h: d - h / self.alpha, delta, state)
    return *optimizer.step(delta), state
