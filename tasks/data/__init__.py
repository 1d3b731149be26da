"""Where text comes from: one door (:mod:`tasks.data.sources`), the embedded set, and tokens to train on."""
