"""What every report is made of: words, tables, terminal, markdown, HTML page, figures."""
