"""`pemt sweep`: methods × tasks × seeds from one YAML, with a table and a chart."""
