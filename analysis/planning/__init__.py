"""The parts of a plan (`analysis.plan`): what serving takes in memory, the formats that exist, what other laws say."""
